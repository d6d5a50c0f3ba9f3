"""SACViT: stem, rotary positions, transformer. One state dict for 2D, thick-slice and isotropic images.

Shape legend: B batch, C channels, D H W voxels, L tokens, K visible tokens, E width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_umit.architectures.rope import gather_table, rotary_table
from nnunet_umit.architectures.sac import FIDELITIES
from nnunet_umit.architectures.stem import STEMS, ConvStem, PatchStem
from nnunet_umit.architectures.transformer import Transformer
from nnunet_umit.spacing import NATURAL, Anisotropy, Size3, TokenGrid, token_grid

Spacings = Sequence[Sequence[float]]

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 48, "depth": 3, "num_heads": 3},
    "XS": {"embed_dim": 256, "depth": 8, "num_heads": 8},
    "S": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "B": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "L": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


@dataclass
class Embedding:
    """What the stem made: tokens (B, K or L, E), its features (finest first), the padded image (B, C, D, H, W), and the
    grid and anisotropy they belong to."""

    tokens: Tensor
    features: list[Tensor]
    image: Tensor
    grid: TokenGrid
    anisotropy: Anisotropy


@dataclass
class Encoding:
    """What the encoder saw: tokens after the final norm (B, K, E), outputs of the tapped blocks, the stem's features
    (finest first), the padded image (B, C, D, H, W), and the grid and anisotropy they belong to."""

    tokens: Tensor
    taps: list[Tensor]
    features: list[Tensor]
    image: Tensor
    grid: TokenGrid
    anisotropy: Anisotropy


class SACViT(nn.Module):
    """Vision transformer with a spacing-adaptive stem (PUMIT, arXiv 2312.07630).

    Args:
        input_channels: image channels C.
        spacing: voxel spacing in mm in the network's axis order (depth first), or two values for 2D. It changes how the
            stored weights are used, never their shapes.
        token_size: in-plane token extent in voxels: 4, 8 or 16. The depth extent follows from the spacing.
        stem: ``"conv"`` or ``"patch"``.
        embed_dim, depth, num_heads, mlp_ratio: size of the transformer.
        stem_channels: widths of the conv stem at full, half and quarter resolution.
        drop_path: stochastic depth rate of the last block.
        fidelity: ``"exact"`` SAC or ``"pumit"``, the paper's rule.
        positions: unit of the rotary positions, see :func:`nnunet_umit.spacing.token_grid`.
        checkpointing, cpu_bfloat16: see :class:`~nnunet_umit.architectures.transformer.Transformer`.
    """

    def __init__(
        self,
        input_channels: int,
        *,
        spacing: Sequence[float],
        token_size: int,
        stem: str = "conv",
        embed_dim: int = 256,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 8 / 3,
        stem_channels: Sequence[int] = (8, 24, 64),
        drop_path: float = 0.0,
        fidelity: str = "exact",
        positions: str = "relative",
        checkpointing: bool = False,
        cpu_bfloat16: bool = False,
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem {stem!r} is not one of {', '.join(STEMS)}")
        if fidelity not in FIDELITIES:
            raise ValueError(f"fidelity {fidelity!r} is not one of {', '.join(FIDELITIES)}")
        self.spacing = tuple(float(value) for value in spacing)
        self.token_size = token_size
        self.positions = positions
        self.embed_dim = embed_dim
        self.depth = depth
        self.head_dim = embed_dim // num_heads
        token_grid((1, 1, 1), [self.spacing], token_size, positions)  # refuses bad values now, not in the first step
        if stem == "conv":
            self.stem: nn.Module = ConvStem(input_channels, embed_dim, token_size, stem_channels, fidelity)
        else:
            self.stem = PatchStem(input_channels, embed_dim, token_size, fidelity)
        self.transformer = Transformer(embed_dim, depth, num_heads, mlp_ratio, checkpointing, cpu_bfloat16)
        self.set_drop_path(drop_path)

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Channels of the stem's features, finest first; none for a patch stem."""
        return self.stem.feature_channels  # type: ignore[return-value]

    def set_drop_path(self, rate: float) -> None:
        """Change the stochastic depth rate (a training option, not part of the architecture)."""
        self.transformer.set_drop_path(rate)

    def grid(self, image: Tensor, spacings: Spacings | None = None, order: Size3 = NATURAL) -> TokenGrid:
        """The token grid of an image (B, C, D, H, W), or (B, C, H, W) which is a 2D image."""
        size = tuple(image.shape[2:]) if image.dim() == 5 else (1, *image.shape[2:])
        return token_grid(size, self._spacings(image, spacings), self.token_size, self.positions, order)

    def forward(
        self,
        image: Tensor,
        *,
        spacings: Spacings | None = None,
        order: Size3 = NATURAL,
        visible: Tensor | None = None,
        taps: Sequence[int] = (),
    ) -> Encoding:
        """Encode the whole image or its visible tokens.

        Args:
            image: (B, C, D, H, W), or (B, C, H, W), of any size; padded with zeros at the far end to whole tokens.
            spacings: mm of every sample, depth first, all of one level; None takes the network's own for all.
            order: axes that depth, height and width were before the image was turned; the weights turn alike.
            visible: (B, K) token indices; nothing else of the image is seen.
            taps: zero-based blocks whose outputs are returned as well.

        Raises:
            ValueError: an image that has neither four nor five axes.
        """
        embedded = self.embed(image, spacings=spacings, order=order, visible=visible)
        rope = self.rope(embedded.grid, visible, image.device)
        tokens, tapped = self.transformer(embedded.tokens, rope, taps=taps)
        return Encoding(tokens, tapped, embedded.features, embedded.image, embedded.grid, embedded.anisotropy)

    def embed(
        self,
        image: Tensor,
        *,
        spacings: Spacings | None = None,
        order: Size3 = NATURAL,
        visible: Tensor | None = None,
    ) -> Embedding:
        """The stem alone; arguments and errors as for the whole."""
        if image.dim() not in (4, 5):
            raise ValueError(f"image has shape {tuple(image.shape)}; expected (B, C, D, H, W) or (B, C, H, W)")
        grid = self.grid(image, spacings, order)
        anisotropy = Anisotropy.from_spacings(self._spacings(image, spacings), order)
        image = grid.pad(image)
        tokens, features = self.stem(image, grid, anisotropy, visible)
        return Embedding(tokens, features, image, grid, anisotropy)

    def rope(self, grid: TokenGrid, visible: Tensor | None, device: torch.device) -> Tensor:
        """Rotary table of all tokens of a grid, or of the visible ones (B, K)."""
        return gather_table(rotary_table(grid, self.head_dim, device), visible)

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning-rate decay: 0 stem, k + 1 block k, depth + 1 the rest."""
        if name.startswith("stem."):
            return 0
        block = re.match(r"transformer\.blocks\.(\d+)\.", name)
        return int(block.group(1)) + 1 if block else self.depth + 1

    def _spacings(self, image: Tensor, spacings: Spacings | None) -> Spacings:
        if spacings is not None:
            return spacings
        return [self.spacing if image.dim() == 5 else self.spacing[-2:]]


def encoder_arguments(arch_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The part of a plan's ``arch_kwargs`` that the encoder takes."""
    return {key: arch_kwargs[key] for key in ENCODER_ARGUMENTS if key in arch_kwargs}


ENCODER_ARGUMENTS = (
    "spacing",
    "token_size",
    "stem",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "stem_channels",
    "drop_path",
    "fidelity",
    "positions",
    "checkpointing",
    "cpu_bfloat16",
)
