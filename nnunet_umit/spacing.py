"""Voxel spacing turned into numbers the networks use: anisotropy, token size, token grid, positions.

The only definition of these ideas; every other room imports it. Standard library only, so that planners and
command line tools can use it without torch. Axis order is always (depth, height, width), and depth is the axis with
the largest spacing: nnU-Net's transpose guarantees it, and native images are turned so. Where they were turned,
``order`` says which axes of the image these three were, and the stored weights turn alike: anatomy keeps its
orientation, whichever axis the slices are thick along.

Shape legend: B batch, C channels, D H W voxels, L tokens, P values in a token (depth, height, width, channel order).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_RATIO = 32.0
MAX_LEVEL = 5
PLANAR_RATIO = 100.0
TOLERANCE = 1e-6  # spacings that were calculated (oblique headers, zooms) are a hair off; 3.9999999 must be level 2

Size3 = tuple[int, int, int]
NATURAL: Size3 = (0, 1, 2)  # axes of an image that was not turned


@dataclass(frozen=True)
class Anisotropy:
    """How many times thicker a slice is than a pixel is wide (PUMIT, arXiv 2312.07630, degree of anisotropy).

    Args:
        ratio: depth spacing / finest in-plane spacing, from 1 to 32, or ``math.inf`` for a 2D image, which has no
            neighbouring slices at all. Use :meth:`from_spacing` to clip a measured ratio into this range.
        ratios: one ratio for each sample of a batch, where they differ; they share a level, and the first is ``ratio``.
        order: axes of the image that are depth, height and width here.
    """

    ratio: float
    ratios: tuple[float, ...] = ()
    order: Size3 = NATURAL

    def __post_init__(self) -> None:
        if sorted(self.order) != list(NATURAL):
            raise ValueError(f"order {self.order} is not an order of the axes 0, 1 and 2")
        for ratio in (self.ratio, *self.ratios):
            if not (1.0 <= ratio <= MAX_RATIO or ratio == math.inf):
                raise ValueError(
                    f"anisotropy ratio {ratio} is outside 1..{MAX_RATIO:g} (or inf for 2D); "
                    "use Anisotropy.from_spacing, which clips it"
                )
        if len({(Anisotropy(ratio).level, ratio == math.inf) for ratio in self.ratios}) > 1:
            raise ValueError(f"a batch holds one level, but the ratios {self.ratios} belong to several")

    @classmethod
    def from_spacing(cls, spacing: Sequence[float]) -> Anisotropy:
        """From voxel spacing in mm: three values (depth first) or two, which is a 2D image.

        So is a depth spacing of 100 pixels and more: nnU-Net gives the missing axis of a 2D image 999 times the others.

        Raises:
            ValueError: another number of values, or one that is not a positive finite number.
        """
        values = [float(value) for value in spacing]
        if len(values) not in (2, 3) or any(not math.isfinite(value) or value <= 0 for value in values):
            raise ValueError(f"spacing {list(spacing)} must be two or three positive numbers in mm (depth first)")
        if len(values) == 2:
            return cls(math.inf)
        ratio = min(max(values[0] / min(values[1:]), 1.0), PLANAR_RATIO)
        for bound in (PLANAR_RATIO, 2.0 ** round(math.log2(ratio))):
            if math.isclose(ratio, bound, rel_tol=TOLERANCE):
                ratio = bound
        return cls(math.inf if ratio == PLANAR_RATIO else min(ratio, MAX_RATIO))

    @classmethod
    def from_spacings(cls, spacings: Sequence[Sequence[float]], order: Size3 = NATURAL) -> Anisotropy:
        """One spacing for each sample of a batch, depth first; ``order`` as above.

        Raises:
            ValueError: the samples do not share a level.
        """
        return cls._joined([cls.from_spacing(spacing).ratio for spacing in spacings], order)

    @classmethod
    def _joined(cls, ratios: Sequence[float], order: Size3) -> Anisotropy:
        return cls(ratios[0], tuple(ratios) if len(set(ratios)) > 1 else (), order)

    @property
    def planar(self) -> bool:
        """True for a 2D image."""
        return self.ratio == math.inf

    @property
    def level(self) -> int:
        """``floor(log2(ratio))``, 0 (isotropic) to 5 (2D)."""
        return MAX_LEVEL if self.planar else int(math.floor(math.log2(self.ratio)))

    @property
    def inverse_ratio(self) -> float:
        """``1 / ratio``; 0 for a 2D image."""
        return 0.0 if self.planar else 1.0 / self.ratio

    def at(self, halvings: int) -> Anisotropy:
        """The anisotropy that is left after in-plane size was halved ``halvings`` times.

        Depth is not halved while the voxel is still thick, so each of the first ``level`` halvings halves the ratio.
        """
        if self.planar:
            return self
        steps = 2 ** min(halvings, self.level)
        return Anisotropy._joined([max(ratio / steps, 1.0) for ratio in self.ratios or (self.ratio,)], self.order)

    def depth_stride(self, stride: int, halvings: int = 0) -> int:
        """Depth stride of a layer with in-plane stride ``stride`` that follows ``halvings`` in-plane halvings."""
        steps = _log2(stride, "stride")
        pending = max(self.level - halvings, 0)
        if self.planar:
            return 1
        return 2 ** max(steps - pending, 0)

    def token(self, size: int) -> Size3:
        """Token extent in voxels for the in-plane token ``size``: as near to a cube in mm as whole slices allow."""
        return (self.depth_stride(size), size, size)

    def strides(self, size: int) -> list[Size3]:
        """Strides from one resolution level to the next, as nnU-Net writes them: ``[(1, 1, 1), ...]``."""
        return [(1, 1, 1)] + [(self.depth_stride(2, n), 2, 2) for n in range(_log2(size, "token size"))]


@dataclass(frozen=True)
class TokenGrid:
    """An image cut into tokens: every padding, flatten and unflatten of a token sequence goes through here.

    The image is padded at its far end to whole tokens. Token order is depth, height, width (width fastest); inside a
    token the values are ordered depth, height, width, channel (methods.md, MAE-1).

    Args:
        image_size: voxels (depth, height, width).
        token: token extent in voxels (depth, height, width).
        steps: position units from one token to the next along (depth, height, width), for every sample of a batch, or
            once where all samples agree.
        order: axes of the image that are depth, height and width here.
    """

    image_size: Size3
    token: Size3
    steps: tuple[tuple[float, float, float], ...] = ((1.0, 1.0, 1.0),)
    order: Size3 = NATURAL

    def __post_init__(self) -> None:
        if min(self.image_size) < 1 or min(self.token) < 1:
            raise ValueError(f"image size {self.image_size} and token {self.token} must be at least one voxel per axis")

    @property
    def shape(self) -> Size3:
        """Tokens per axis."""
        d, h, w = (-(-size // token) for size, token in zip(self.image_size, self.token, strict=True))
        return d, h, w

    @property
    def padded_size(self) -> Size3:
        """Voxels per axis after padding to whole tokens."""
        d, h, w = (count * token for count, token in zip(self.shape, self.token, strict=True))
        return d, h, w

    @property
    def tokens(self) -> int:
        """Number of tokens L."""
        return math.prod(self.shape)

    def pad(self, image: Any) -> Any:
        """(B, C, *image_size) or (B, C, H, W) tensor -> (B, C, *padded_size) tensor, zeros at the far end."""
        from torch.nn import functional  # this module is also for those who have no tensors, and no torch

        image = image if image.dim() == 5 else image.unsqueeze(2)
        self._check(image, self.image_size)
        d, h, w = (padded - size for padded, size in zip(self.padded_size, self.image_size, strict=True))
        return functional.pad(image, (0, w, 0, h, 0, d)) if d or h or w else image

    def patchify(self, image: Any) -> Any:
        """(B, C, *padded_size) tensor -> (B, L, P) tensor."""
        batch, channels = image.shape[:2]
        self._check(image, self.padded_size)
        (d, h, w), (td, th, tw) = self.shape, self.token
        patches = image.reshape(batch, channels, d, td, h, th, w, tw).permute(0, 2, 4, 6, 3, 5, 7, 1)
        return patches.reshape(batch, d * h * w, td * th * tw * channels)

    def unpatchify(self, patches: Any, channels: int) -> Any:
        """(B, L, P) tensor -> (B, C, *padded_size) tensor, the inverse of :meth:`patchify`."""
        batch = patches.shape[0]
        (d, h, w), (td, th, tw) = self.shape, self.token
        image = patches.reshape(batch, d, h, w, td, th, tw, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return image.reshape(batch, channels, d * td, h * th, w * tw)

    def unflatten(self, tokens: Any) -> Any:
        """(B, L, C) tokens -> (B, C, *shape) feature map."""
        return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *self.shape)

    def expand(self, mask: Any) -> Any:
        """(B, L) values per token -> (B, 1, *padded_size), each repeated over the voxels of its token."""
        image = mask.reshape(mask.shape[0], 1, *self.shape)
        for axis, repeats in enumerate(self.token, start=2):
            image = image.repeat_interleave(repeats, axis)
        return image

    def crop(self, image: Any) -> Any:
        """Undo the padding of a (..., *padded_size) tensor."""
        depth, height, width = self.image_size
        return image[..., :depth, :height, :width]

    def _check(self, image: Any, size: Size3) -> None:
        if tuple(image.shape[2:]) != size:
            raise ValueError(f"image of size {tuple(image.shape[2:])} does not fit the grid of size {size}")


def token_grid(
    image_size: Sequence[int],
    spacings: Sequence[Sequence[float]],
    token_size: int,
    positions: str,
    order: Size3 = NATURAL,
) -> TokenGrid:
    """The token grid of a batch of images in a network with in-plane token ``token_size``.

    Args:
        image_size: voxels (depth, height, width).
        spacings: mm, three values or two (2D), of every sample, or once for all; all of one level.
        token_size: in-plane token extent in voxels, a power of two.
        positions: ``"relative"``: one unit is one in-plane token, and equal millimetres are equal distances on every
            axis (depth steps are scaled by the token's real thickness); ``"index"``: PUMIT's plain token index;
            ``"mm"``: one unit is ``token_size`` millimetres, so tokens of different spacing agree as well.
        order: axes of the image that are depth, height and width here.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions {positions!r} is not one of {', '.join(POSITIONS)}")
    token = Anisotropy.from_spacings(spacings).token(token_size)
    steps = [_steps(spacing, token, positions) for spacing in spacings]
    depth, height, width = image_size
    return TokenGrid((depth, height, width), token, tuple(steps) if len(set(steps)) > 1 else (steps[0],), order)


def native_spacing(spacing: Sequence[float], shape: Sequence[float]) -> list[float]:
    """Spacing in mm of an image as a native network is told it: one voxel along an axis is no depth.

    A radiograph that is stored as a volume of one slice has some number there (often 1 mm, for want of another).
    """
    single = [axis for axis, size in enumerate(shape) if size == 1]
    told = [float(value) for value in spacing]
    if len(single) == 1:
        told[single[0]] = NO_DEPTH * max(value for axis, value in enumerate(told) if axis != single[0])
    return told


def _steps(spacing: Sequence[float], token: Size3, positions: str) -> tuple[float, float, float]:
    anisotropy = Anisotropy.from_spacing(spacing)
    unit = float(min(spacing[-2:])) if positions == "mm" else 1.0
    depth = 1.0 if anisotropy.planar or positions == "index" else anisotropy.ratio * token[0] / token[1]
    return depth * unit, unit, unit


POSITIONS = ("relative", "index", "mm")
NO_DEPTH = 999.0  # nnU-Net's depth spacing for 2D images, in pixels


def _log2(value: int, name: str) -> int:
    steps = value.bit_length() - 1
    if value < 1 or 2**steps != value:
        raise ValueError(f"{name} {value} is not a power of two; use 4, 8 or 16")
    return steps
