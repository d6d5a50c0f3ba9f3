"""Stems: image and anisotropy to tokens, and the skip features on the way.

``PatchStem``: one SAC projection per token, as in PUMIT and UNETR; hidden tokens are dropped before the projection.
``ConvStem``: convolutions at full, half and quarter resolution, whose outputs are also the decoder's skip features,
then one projection. Under masking the hidden voxels are zeroed before the first convolution, so nothing leaks, and
hidden tokens are dropped before the projection. The convolutions are the same for every token size; only the
projection's kernel grows with it.

Shape legend: B batch, C channels, D H W voxels, L tokens, K visible tokens, E width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_umit.architectures.sac import SACConv, SACDown
from nnunet_umit.spacing import Anisotropy, TokenGrid

STEMS = ("conv", "patch")
CONV_STEM_STRIDE = 4


def take_tokens(tokens_BLE: Tensor, index_BK: Tensor | None) -> Tensor:
    """Rows of a token sequence: (B, L, E) and (B, K) -> (B, K, E); all of them for None."""
    if index_BK is None:
        return tokens_BLE
    return tokens_BLE.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, tokens_BLE.shape[-1]))


def embed_patches(image_BCDHW: Tensor, kernel: Tensor, bias: Tensor | None, visible_BK: Tensor | None) -> Tensor:
    """Kernel = stride convolution as a reshape and one matrix product, for the visible tokens only: (B, K, E)."""
    depth, height, width = image_BCDHW.shape[2:]
    patches = TokenGrid((depth, height, width), tuple(kernel.shape[2:])).patchify(image_BCDHW)  # type: ignore[arg-type]
    matrix = kernel.permute(0, 2, 3, 4, 1).reshape(kernel.shape[0], -1)
    return F.linear(take_tokens(patches, visible_BK), matrix, bias)


class ConvNormAct(nn.Module):
    """Same-size SAC convolution, instance norm with affine parameters, LeakyReLU; the shape of nnU-Net's own block.

    Instance norm is written as a group norm with one channel a group, which also accepts a single voxel.
    """

    def __init__(self, in_channels: int, out_channels: int, fidelity: str) -> None:
        super().__init__()
        self.conv = SACConv(in_channels, out_channels, fidelity)
        self.norm = nn.GroupNorm(out_channels, out_channels)

    def forward(self, image_BCDHW: Tensor, anisotropy: Anisotropy, halvings: int) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(image_BCDHW, anisotropy, halvings)), 0.01, inplace=True)


class PatchStem(nn.Module):
    """One projection per token."""

    feature_channels: tuple[int, ...] = ()

    def __init__(self, in_channels: int, dim: int, token_size: int, fidelity: str) -> None:
        super().__init__()
        self.project = SACDown(in_channels, dim, token_size, fidelity)

    def forward(
        self, image_BCDHW: Tensor, grid: TokenGrid, anisotropy: Anisotropy, visible_BK: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns tokens (B, K or L, E) and no skip features."""
        kernel = self.project.kernel(anisotropy, 0)
        return embed_patches(image_BCDHW, kernel, self.project.bias, visible_BK), []


class ConvStem(nn.Module):
    """Three resolutions of convolutions and one projection.

    Args:
        channels: width at full, half and quarter in-plane resolution.
    """

    def __init__(self, in_channels: int, dim: int, token_size: int, channels: Sequence[int], fidelity: str) -> None:
        super().__init__()
        if len(channels) != 3:
            raise ValueError(f"stem_channels {list(channels)} must be three widths: full, half and quarter resolution")
        if token_size < CONV_STEM_STRIDE:
            raise ValueError(f"token_size {token_size} is below 4, the stride of the conv stem; use 4, 8 or 16")
        self.feature_channels = tuple(channels)
        self.full = ConvNormAct(in_channels, channels[0], fidelity)
        self.down = nn.ModuleList(SACDown(a, b, 2, fidelity) for a, b in zip(channels[:2], channels[1:], strict=True))
        self.conv = nn.ModuleList(ConvNormAct(width, width, fidelity) for width in channels[1:])
        self.project = SACDown(channels[2], dim, token_size // CONV_STEM_STRIDE, fidelity)

    def forward(
        self, image_BCDHW: Tensor, grid: TokenGrid, anisotropy: Anisotropy, visible_BK: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns tokens (B, K or L, E) and the features at full, half and quarter resolution."""
        if visible_BK is not None:
            shown = image_BCDHW.new_zeros(image_BCDHW.shape[0], grid.tokens).scatter(1, visible_BK, 1.0)
            image_BCDHW = image_BCDHW * grid.expand(shown)
        features = [self.full(image_BCDHW, anisotropy, 0)]
        for halvings, (down, conv) in enumerate(zip(self.down, self.conv, strict=True), start=1):
            features.append(conv(down(features[-1], anisotropy, halvings - 1), anisotropy, halvings))
        kernel = self.project.kernel(anisotropy, 2)
        return embed_patches(features[-1], kernel, self.project.bias, visible_BK), features
