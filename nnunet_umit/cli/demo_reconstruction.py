"""One held-out image through the pre-trained masked autoencoder, for the demo's picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_umit.cli.demo_data import DemoData, read_json
from nnunet_umit.cli.demo_report import Reconstruction


def reconstruct(data: DemoData, case: str, model_folder: Path, configuration: str) -> Reconstruction:
    """Hide most tokens of a held-out image and let the pre-trained network fill them in.

    The image is preprocessed as nnU-Net does for prediction and cut to the patch of the plans around its centre.

    Args:
        data: The demo's data.
        case: A held-out case.
        model_folder: Folder of the pre-training, with ``plans.json`` and ``fold_all``.
        configuration: Name in the plans.
    """
    import torch
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_umit.architectures.mae import MaskedAutoencoder
    from nnunet_umit.config import get_umit_config

    plans = PlansManager(read_json(model_folder / "plans.json"))
    settings = plans.get_configuration(configuration)
    description = data.description()
    channels = determine_num_input_channels(plans, settings, description)
    config = get_umit_config(settings).pretrain
    network = MaskedAutoencoder.from_arch_kwargs(channels, settings.network_arch_init_kwargs, config)
    checkpoint = torch.load(model_folder / "fold_all" / "checkpoint_final.pth", map_location="cpu", weights_only=True)
    network.load_state_dict(checkpoint["network_weights"])
    network.eval()

    ending = description["file_ending"]
    folder, count = data.folder / "imagesTs", len(description["channel_names"])
    files = [str(folder / f"{case}_{channel:04d}{ending}") for channel in range(count)]
    array, *_ = settings.preprocessor_class(verbose=False).run_case(files, None, plans, settings, description)
    volume = np.asarray(array, dtype=np.float32)
    planar = len(settings.patch_size) == 2
    image = torch.from_numpy(_centre(volume, (1, *settings.patch_size) if planar else settings.patch_size))[None]
    masked, filled, output = network.reconstruct(
        image[:, :, 0] if planar else image, torch.Generator().manual_seed(config.seed)
    )
    depth, height, width = (1.0, *settings.spacing) if planar else settings.spacing
    plain, hidden, predicted = (each.reshape(image.shape)[0, 0].numpy() for each in (image, masked, filled))
    return Reconstruction(
        image=plain,
        masked=hidden,
        filled=predicted,
        spacing=(float(depth), float(height), float(width)),
        mask_ratio=output.hidden.shape[1] / (output.hidden.shape[1] + output.visible.shape[1]),
    )


def _centre(volume: np.ndarray[Any, Any], patch: Sequence[int]) -> np.ndarray[Any, Any]:
    """The middle of (C, D, H, W), at most ``patch`` large."""
    starts = [max(0, (size - most) // 2) for size, most in zip(volume.shape[1:], patch, strict=True)]
    cuts = (slice(None), *(slice(start, start + most) for start, most in zip(starts, patch, strict=True)))
    return np.ascontiguousarray(volume[cuts])
