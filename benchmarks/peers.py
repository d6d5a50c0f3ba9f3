"""Networks of others, to be measured beside ours. Nothing of theirs is a dependency of the package."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.common import REPOSITORY, say

MONAI = "monai==1.6.1"


def monai_folder() -> Path:
    """``$UMIT_MONAI``, else ``benchmarks/work/monai``."""
    return Path(os.environ.get("UMIT_MONAI") or REPOSITORY / "benchmarks" / "work" / "monai").resolve()


def install_beside(requirement: str, folder: Path) -> None:
    """Install a package into a folder of its own, without what it needs: nnU-Net brings that.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    say(f"installing {requirement} into {folder.name}/ (it is only measured, no dependency) ...")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), requirement]
    subprocess.run(command, check=True)


def import_monai(module: str) -> Any:
    """A module of MONAI, from the environment or from :func:`monai_folder`, where it is installed if it is missing.

    Only MONAI itself is installed (``--no-deps``): what it needs here is torch, numpy and einops, which nnU-Net brings.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    folder = monai_folder()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # behind the environment: only monai itself comes from there
    if importlib.util.find_spec("monai") is None:
        install_beside(MONAI, folder)
        importlib.invalidate_caches()
    return importlib.import_module(module)


def monai_mae(
    image_size: Sequence[int], token: int, mask_ratio: float, encoder: dict[str, int], decoder: dict[str, int]
) -> nn.Module:
    """MONAI's masked autoencoder; sizes are named as ours are."""
    return import_monai("monai.networks.nets.masked_autoencoder_vit").MaskedAutoEncoderViT(
        in_channels=1,
        img_size=tuple(image_size),
        patch_size=token,
        hidden_size=encoder["embed_dim"],
        mlp_dim=4 * encoder["embed_dim"],
        num_layers=encoder["depth"],
        num_heads=encoder["num_heads"],
        masking_ratio=mask_ratio,
        decoder_hidden_size=decoder["decoder_dim"],
        decoder_mlp_dim=4 * decoder["decoder_dim"],
        decoder_num_layers=decoder["decoder_depth"],
        decoder_num_heads=decoder["decoder_heads"],
        qkv_bias=True,
    )


def unetr(image_size: Sequence[int], classes: int) -> nn.Module:
    """MONAI's UNETR as published: 768 x 12, tokens of 16 voxels."""
    return import_monai("monai.networks.nets.unetr").UNETR(1, classes, tuple(image_size))


def swin_unetr(classes: int) -> nn.Module:
    """MONAI's Swin UNETR with its default width of 24."""
    return import_monai("monai.networks.nets.swin_unetr").SwinUNETR(1, classes)


def primus_s(patch: Sequence[int], classes: int) -> nn.Module:
    """The network of nnU-Net's nnUNet_Primus_S_Trainer, one input channel."""
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_S_Trainer

    class Patch:
        patch_size = list(patch)

    return nnUNet_Primus_S_Trainer.build_network_architecture(None, Patch, 1, classes, False)
