"""Stems: image and anisotropy to tokens, and the skip features on the way.

``PatchStem``: one SAC projection per token, as in PUMIT and UNETR; hidden tokens are dropped before the projection.
``ConvStem``: convolutions at full, half and quarter resolution, whose outputs are also the decoder's skip features,
then one projection. Under masking the hidden voxels are zeroed before the first convolution, so nothing leaks, and
hidden tokens are dropped before the projection. Norms then see visible voxels only, and hidden ones stay zero (as in
SparK, arXiv 2301.03580): statistics over an image that is mostly zeros would be others than those of the whole image
that fine-tuning shows. The convolutions are the same for every token size; only the projection's kernel grows with it.

Shape legend: B batch, C channels, D H W voxels, L tokens, K visible tokens, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_umit.architectures.masking import without_autocast
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


@dataclass(frozen=True)
class Shown:
    """Where an image is visible: ``mask`` (B, 1, D, H, W), 1 or 0; the ones are the ``share`` of every sample."""

    mask: Tensor
    share: float

    @classmethod
    def of(cls, image_BCDHW: Tensor, grid: TokenGrid, visible_BK: Tensor) -> Shown:
        """The voxels of the visible tokens of a padded image."""
        tokens = image_BCDHW.new_zeros(image_BCDHW.shape[0], grid.tokens).scatter(1, visible_BK, 1.0)
        return cls(grid.expand(tokens), visible_BK.shape[1] / grid.tokens)

    def halved(self, depth_stride: int) -> Shown:
        """After a down-sampling whose steps divide the tokens."""
        return replace(self, mask=self.mask[:, :, ::depth_stride, ::2, ::2])

    def normalise(self, image_BCDHW: Tensor, norm: nn.GroupNorm) -> Tensor:
        """Instance norm by the visible voxels, in float32; hidden ones become 0."""
        with without_autocast(image_BCDHW.device):
            image, mask = image_BCDHW.float(), self.mask.float()
            image = image * mask
            mean = image.mean((2, 3, 4), keepdim=True) / self.share
            image = torch.addcmul(image, mean, mask, value=-1)
            variance = image.square().mean((2, 3, 4), keepdim=True) / self.share
            scale = norm.weight.float().view(1, -1, 1, 1, 1) * (variance + norm.eps).rsqrt()
            return image * scale + norm.bias.float().view(1, -1, 1, 1, 1) * mask


class ConvNormAct(nn.Module):
    """Same-size SAC convolution, instance norm with affine parameters, LeakyReLU; the shape of nnU-Net's own block.

    Instance norm is written as a group norm with one channel a group.
    """

    def __init__(self, in_channels: int, out_channels: int, fidelity: str) -> None:
        super().__init__()
        self.conv = SACConv(in_channels, out_channels, fidelity)
        self.norm = nn.GroupNorm(out_channels, out_channels)

    def forward(self, image_BCDHW: Tensor, anisotropy: Anisotropy, halvings: int, shown: Shown | None = None) -> Tensor:
        image_BCDHW = self.conv(image_BCDHW, anisotropy, halvings)
        image_BCDHW = self.norm(image_BCDHW) if shown is None else shown.normalise(image_BCDHW, self.norm)
        return F.leaky_relu(image_BCDHW, 0.01, inplace=True)


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
        shown = None if visible_BK is None else Shown.of(image_BCDHW, grid, visible_BK)
        if shown is not None:
            image_BCDHW = image_BCDHW * shown.mask
        features = [self.full(image_BCDHW, anisotropy, 0, shown)]
        for halvings, (down, conv) in enumerate(zip(self.down, self.conv, strict=True), start=1):
            if shown is not None:
                shown = shown.halved(anisotropy.depth_stride(2, halvings - 1))
            finer = down(features[-1], anisotropy, halvings - 1)
            if shown is not None:
                finer = finer * shown.mask  # its bias would tell the next convolution where the hidden voxels begin
            features.append(conv(finer, anisotropy, halvings, shown))
        kernel = self.project.kernel(anisotropy, 2)
        return embed_patches(features[-1], kernel, self.project.bias, visible_BK), features
