"""nnssl's EvaMAE, out of a checkout (it is not on PyPI), for the benchmark of masked-autoencoder steps.

nnssl needs a timm older than the one that nnU-Net installs, so this runs in processes of its own (step_process.py),
with that timm from a folder in front of the environment. Only its network is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import REPOSITORY
from benchmarks.peers import install_beside

TIMM = "timm==1.0.16"
HEADS = 8  # its rotary positions need heads whose width is a multiple of 6: 48, not 64


def timm_folder() -> Path:
    """``$UMIT_NNSSL_TIMM``, else ``benchmarks/work/nnssl_timm``."""
    return Path(os.environ.get("UMIT_NNSSL_TIMM") or REPOSITORY / "benchmarks" / "work" / "nnssl_timm").resolve()


def prepare(checkout: Path) -> None:
    """Check the checkout, and install timm if it is missing.

    Raises:
        FileNotFoundError: the folder is no checkout of nnssl.
        subprocess.CalledProcessError: pip could not install timm.
    """
    wanted = checkout / "src" / "nnssl" / "architectures" / "evaMAE_module.py"
    if not wanted.is_file():
        raise FileNotFoundError(f"{wanted} is missing: --nnssl must name a checkout of github.com/MIC-DKFZ/nnssl")
    folder = timm_folder()
    if not (folder / "timm").is_dir():
        install_beside(TIMM, folder)


def build(
    checkout: str,
    image_size: Sequence[int],
    batch: int,
    token: int,
    mask_ratio: float,
    encoder: dict[str, int],
    decoder_depth: int,
    optimiser: dict[str, float],
) -> tuple[nn.Module, Callable[[], None]]:
    """EvaMAE and its training step on a fixed random image: mean squared error over the hidden voxels, as its trainer
    takes it. Width, depth, tokens and mask ratio are those given; its decoder is as wide as its encoder.

    Raises:
        RuntimeError: this process has imported another timm already.
    """
    if "timm" in sys.modules:
        raise RuntimeError("timm is imported already; nnssl must be built in a process of its own")
    sys.path[:0] = [str(timm_folder()), str(Path(checkout) / "src")]
    module = importlib.import_module("nnssl.architectures.evaMAE_module")
    torch.manual_seed(0)
    network = module.EvaMAE(
        input_channels=1,
        embed_dim=encoder["embed_dim"],
        patch_embed_size=(token,) * 3,
        output_channels=1,
        encoder_eva_depth=encoder["depth"],
        encoder_eva_numheads=HEADS,
        decoder_eva_depth=decoder_depth,
        decoder_eva_numheads=HEADS,
        input_shape=tuple(image_size),
        patch_drop_rate=mask_ratio,
        init_values=0.1,
        scale_attn_inner=True,
    ).train()
    image = torch.randn(batch, 1, *image_size)
    optimizer = torch.optim.AdamW(network.parameters(), **optimiser)  # type: ignore[arg-type]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        prediction, kept = network(image)
        hidden_voxels_loss(prediction, image, kept, token).backward()
        optimizer.step()

    return network, step


def step_of(*arguments: object) -> Callable[[], None]:
    """The step alone, for a process that measures memory; arguments as for :func:`build`."""
    return build(*arguments)[1]  # type: ignore[arg-type]


def hidden_voxels_loss(prediction: Tensor, image: Tensor, kept: Tensor, token: int) -> Tensor:
    """Mean squared error (B, C, D, H, W) over the voxels of tokens that are not among ``kept`` (B, K)."""
    grid = [size // token for size in image.shape[2:]]
    hidden = torch.ones(image.shape[0], grid[0] * grid[1] * grid[2]).scatter_(1, kept, 0).reshape(-1, 1, *grid)
    for axis in (2, 3, 4):
        hidden = hidden.repeat_interleave(token, axis)
    return ((prediction - image).square() * hidden).sum() / hidden.sum()
