"""A preprocessed dataset and a plan for in-process trainer tests, written in a moment, without nnU-Net's planning; and
what those tests ask a trainer."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import synthetic
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_umit.spacing import Anisotropy

NAME = "Dataset902_Tiny"
PLANS = "UMITPlans"
NATIVE_SPACINGS = ((1.0, 1.0, 1.0), (4.0, 1.0, 1.0), (5.0, 0.8, 0.8), (1.0, 1.1, 4.5))


def make_plans(
    *,
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    patch: tuple[int, ...] = (16, 16, 16),
    channels: int = 1,
    batch: int = 2,
    token_size: int = 8,
    native: bool = False,
    dataset: str = NAME,
    pretrain: dict[str, Any] | None = None,
    finetune: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What UMITPlanner would write, for a network of a few thousand weights and a training of seconds."""
    short = {"epochs": 2, "iterations_per_epoch": 3, "val_iterations_per_epoch": 2}
    planar = len(spacing) == 2
    strides = [list(step)[1 if planar else 0 :] for step in Anisotropy.from_spacing(spacing).strides(token_size)]
    resampling = {
        f"resampling_fn_{kind}": "resample_data_or_seg_to_shape" for kind in ("data", "seg", "probabilities")
    } | {
        f"resampling_fn_{kind}_kwargs": {"is_seg": kind == "seg", "order": 1, "order_z": 0, "force_separate_z": None}
        for kind in ("data", "seg", "probabilities")
    }
    name = "3d_native" if native else "2d" if planar else "3d_fullres"
    configuration = {
        "data_identifier": f"{PLANS}_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch,
        "patch_size": list(patch),
        "median_image_size_in_voxels": list(patch),
        "spacing": list(spacing),
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "batch_dice": False,
        "architecture": {
            "network_class_name": "nnunet_umit.architectures.unetr.UMITSegmenter",
            "arch_kwargs": {
                "spacing": list(spacing),
                "token_size": token_size,
                "stem": "conv",
                "embed_dim": 24,
                "depth": 2,
                "num_heads": 2,
                "stem_channels": [4, 6, 8],
                "decoder_channels": [4, 6, 8],
                "strides": strides,
                **({"native": True} if native else {}),
            },
            "_kw_requires_import": [],
        },
        "umit": {
            "version": 1,
            "size": "tiny",
            "why": "a test",
            "pretrain": {**short, "decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2, **(pretrain or {})},
            "tokenizer": {**short, "dim": 16, "codes": 8, **(tokenizer or {})},
            "finetune": {**short, "augmentation": "light", **(finetune or {})},
        },
        **resampling,
    }
    if native:
        for kind in ("data", "seg", "probabilities"):
            configuration |= {f"resampling_fn_{kind}": "no_resampling_hack", f"resampling_fn_{kind}_kwargs": {}}
    return {
        "dataset_name": dataset,
        "plans_name": PLANS,
        "original_median_spacing_after_transp": list(spacing),
        "original_median_shape_after_transp": list(patch),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(range(3)),
        "transpose_backward": list(range(3)),
        "configurations": {name: configuration},
        "experiment_planner_used": "UMITPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }


def write_preprocessed(
    folder: Path,
    plans: dict[str, Any],
    *,
    cases: int = 4,
    shape: tuple[int, ...] = (18, 20, 22),
    ignore: int | None = None,
    spacings: Sequence[tuple[float, float, float]] = (),
    seed: int = 0,
) -> Path:
    """Write cases, plans, dataset.json and fingerprint below ``folder`` (nnUNet_preprocessed); returns the case folder.

    ``shape`` is (z, y, x); a 2D plan takes the last two. ``ignore`` is a label for the first quarter of each volume.
    With ``spacings`` (native plans) each case has its own in turn, as three more channels, and a shape of as many mm.
    """
    base = folder / plans["dataset_name"]
    name, configuration = next(iter(plans["configurations"].items()))
    target = base / configuration["data_identifier"]
    target.mkdir(parents=True)
    (base / "dataset_fingerprint.json").write_text("{}")
    spacing = configuration["spacing"]
    if len(spacing) == 2:
        spacing = [999.0, *spacing]
    channels = len(configuration["normalization_schemes"])
    rng = np.random.default_rng(seed)
    for index in range(cases):
        size, steps = shape[-len(configuration["spacing"]) :], configuration["spacing"]
        if spacings:
            steps = list(spacings[index % len(spacings)])
            size = tuple(max(round(length / step), 1) for length, step in zip(shape, steps, strict=True))
        image, label = synthetic.draw_case(size, steps, channels, rng)
        if len(configuration["spacing"]) == 2:
            image, label = image[:, None], label[None]
        image = (image - image.mean()) / image.std()
        if ignore is not None:
            label[: len(label) // 4] = ignore
        locations: dict[Any, np.ndarray] = {value: np.argwhere(label[None] == value) for value in (1, 2)}
        if ignore is not None:  # nnU-Net's key for all annotated voxels
            locations[(-1, *range(ignore))] = np.argwhere(label[None] != ignore)
        if spacings:
            constant = np.broadcast_to(np.asarray(steps)[:, None, None, None], (3, *size))
            image, spacing = np.concatenate((image, constant)), steps
        nnUNetDatasetBlosc2.save_case(
            image.astype(np.float32),
            label[None].astype(np.int16),
            {"spacing": spacing, "class_locations": locations},
            str(target / f"case_{index:03d}"),
            chunks=image.shape,
            blocks=image.shape,
        )
    description = dataset_json(channels, cases)
    (base / "dataset.json").write_text(json.dumps(description))
    (base / f"{plans['plans_name']}.json").write_text(json.dumps(plans))
    return target


def spoil(path: Path, value: float = np.nan) -> None:
    """Replace every voxel of a preprocessed case."""
    image = np.full_like(blosc2.open(str(path), mode="r")[:], value)
    path.unlink()
    blosc2.asarray(image, urlpath=str(path))


def dataset_json(channels: int = 1, cases: int = 4) -> dict[str, Any]:
    """For labels as ``synthetic`` draws them."""
    return {
        "channel_names": {str(index): f"MRI{index}" for index in range(channels)},
        "labels": dict(synthetic.LABELS),
        "numTraining": cases,
        "file_ending": ".nii.gz",
        "licence": "CC0-1.0",
    }


def make_trainer(
    trainer_class: type,
    plans: dict[str, Any],
    *,
    fold: Any = "all",
    resume: bool = False,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
    **description: Any,
) -> Any:
    """A trainer as nnUNetv2_train makes it."""
    plans = copy.deepcopy(plans)
    plans["continue_training"] = resume
    name, configuration = next(iter(plans["configurations"].items()))
    channels = len(configuration["normalization_schemes"])
    return trainer_class(plans, name, fold, {**dataset_json(channels), **description}, device=device)


GEOMETRIES = {
    "isotropic": {},
    "thick slices, two channels": {
        "spacing": (4.0, 1.0, 1.0), "patch": (6, 16, 16), "channels": 2,
    },
    "2D": {"spacing": (1.0, 1.0), "patch": (16, 24)},
}  # fmt: skip


def folder_of(trainer: Any) -> Path:
    return Path(trainer.output_folder)


def curves(trainer: Any) -> dict[str, list[float]]:
    return {name: trainer.logged(name) for name in ("train_losses", "val_losses", "lrs", "ema_fg_dice")}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.unwrapped().state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log_of(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the trainer catches it."""


def kill_at(trainer: Any, iteration: int) -> None:
    """Let the training die in the middle of a step."""
    step = trainer.train_step

    def dying(batch: dict) -> dict:
        if trainer.iteration() == iteration:
            raise Killed
        return step(batch)

    trainer.train_step = dying


def case_file(preprocessed: Path, index: int) -> Path:
    """The image of a case below ``preprocessed`` (nnUNet_preprocessed)."""
    return preprocessed / NAME / "UMITPlans_3d_fullres" / f"case_{index:03d}.b2nd"
