"""Images that carry their own spacing: three constant channels behind the image channels, zero where there is no image.

nnU-Net hands a network nothing but a tensor, in training as in prediction. So the preprocessor of ``3d_native`` appends
the spacing of every case, in mm and in axis order, as channels that are constant over the image. nnU-Net pads with
zeros, so the same channels tell where the image ends. A :class:`NativeView` reads them: it crops the padding away,
turns the thickest axis to the front (where SAC expects it), and puts logits back afterwards. It crops to the box that
holds all images of a batch, so a smaller image among larger ones keeps some padding. Weights and positions turn
by the view's ``order`` as well, so anatomy keeps its orientation, whichever axis is thick.

Shape legend: B batch, C channels, D H W voxels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_umit.spacing import Anisotropy

SPACING_CHANNELS = 3
NEARLY_EQUAL = 1.02  # spacings that differ by less have no thickest axis
OUTSIDE_LOGITS = (-15.0, -30.0)  # first class, others: background under softmax, nothing under sigmoid; fit in float16


def thick_axis(spacing: Sequence[float]) -> int:
    """The axis with the largest spacing; the first one unless another is clearly thicker."""
    axis = max(range(3), key=lambda each: spacing[each])
    return axis if spacing[axis] > NEARLY_EQUAL * spacing[0] else 0


def axis_order(spacing: Sequence[float]) -> tuple[int, int, int]:
    """Axes of an image as the network sees them: the thick one, then the others."""
    first = thick_axis(spacing)
    second, third = (axis for axis in range(3) if axis != first)
    return first, second, third


def depth_first(spacing: Sequence[float]) -> tuple[float, ...]:
    """Spacing with the thick axis in front; two values for a 2D image."""
    turned = tuple(spacing[axis] for axis in axis_order(spacing))
    return turned[1:] if Anisotropy.from_spacing(turned).planar else turned


def bucket(spacing: Sequence[float]) -> tuple[int, int, bool]:
    """What the samples of a batch must share: thick axis, anisotropy level, and whether they are 2D."""
    anisotropy = Anisotropy.from_spacing(depth_first(spacing))
    return thick_axis(spacing), anisotropy.level, anisotropy.planar


def append_spacing(image: Tensor, spacing: Sequence[float], inside: Tensor | None = None) -> Tensor:
    """(C, D, H, W) -> (C + 3, D, H, W).

    Args:
        spacing: mm, in the image's axis order.
        inside: (D, H, W) bool, where the image is; None: everywhere.
    """
    channels = image.new_tensor(list(spacing)).view(3, 1, 1, 1).expand(-1, *image.shape[1:])
    if inside is not None:
        channels = channels * inside
    return torch.cat((image, channels))


@dataclass(frozen=True)
class NativeView:
    """A batch as the network wants it: ``image`` (B, C, d, h, w) cropped to where any sample is, depth first;
    ``spacings`` in mm; ``order``, which axes of the batch depth, height and width were; what :meth:`restore` needs."""

    image: Tensor
    spacings: tuple[tuple[float, ...], ...]
    order: tuple[int, int, int]
    box: tuple[slice, slice, slice]
    size: tuple[int, ...]

    @classmethod
    def of(cls, batch: Tensor) -> NativeView:
        """Read (B, C + 3, D, H, W).

        Raises:
            ValueError: no spacing channels, an empty batch, or samples of several levels or thick axes.
        """
        if batch.dim() != 5 or batch.shape[1] <= SPACING_CHANNELS:
            raise ValueError(
                f"a native network takes (B, C + {SPACING_CHANNELS}, D, H, W), the spacing in the last channels, not "
                f"{tuple(batch.shape)}; preprocess with nnUNetv2_preprocess -plans_name UMITPlans -c 3d_native"
            )
        channels = batch[:, -SPACING_CHANNELS:]
        read = [tuple(row) for row in channels.amax((2, 3, 4)).tolist()]
        if any(not math.isfinite(value) or value <= 0 for row in read for value in row):
            raise ValueError(f"spacing channels must hold positive mm somewhere in the tile, but they hold {read}")
        if len({bucket(row) for row in read}) > 1:
            raise ValueError(f"a batch holds one anisotropy level and one thick axis, but its spacings are {read}")
        inside = (channels[:, 0] > 0).any(0)
        extents = []
        for axis in range(3):
            where = torch.nonzero(inside.amax([other for other in range(3) if other != axis])).flatten()
            extents.append(slice(int(where[0]), int(where[-1]) + 1))
        order = axis_order(read[0])
        box = (extents[0], extents[1], extents[2])
        image = batch[:, :-SPACING_CHANNELS, box[0], box[1], box[2]].permute(0, 1, *(axis + 2 for axis in order))
        spacings = tuple(depth_first(row) for row in read)
        return cls(image.contiguous(), spacings, order, box, tuple(batch.shape[2:]))

    def restore(self, logits: Tensor) -> Tensor:
        """(B, K, d, h, w) logits of the view -> (B, K, D, H, W) of the batch, background outside."""
        logits = logits.permute(0, 1, *(self.order.index(axis) + 2 for axis in range(3)))
        if logits.shape[2:] == self.size:
            return logits.contiguous()
        outside = logits.new_full((logits.shape[1],), OUTSIDE_LOGITS[1])
        outside[0] = OUTSIDE_LOGITS[0]
        whole = outside.view(1, -1, 1, 1, 1).expand(logits.shape[0], -1, *self.size).clone()
        whole[:, :, self.box[0], self.box[1], self.box[2]] = logits
        return whole
