"""What ``3d_native`` is planned for: the images as they are, each with its own spacing.

Batches hold one anisotropy level each, and a higher level has fewer slices at the same physical extent. So the patch is
planned for the lowest level that occurs; every other level then costs less in training. nnU-Net predicts in tiles of
that patch whatever the image: one of thicker slices is shown more of them at once than training did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_umit.architectures.native import depth_first, thick_axis
from nnunet_umit.plans.configuration import SMALL_PATCH
from nnunet_umit.spacing import NO_DEPTH, Anisotropy

THICKEN = 0.3  # of the samples that have no thick slices are given some


@dataclass(frozen=True)
class NativeExtent:
    """Spacing in mm (depth first; two values where all images are 2D) and shape in voxels of the image to plan for."""

    spacing: tuple[float, ...]
    shape: tuple[float, ...]


def representative(spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[float]]) -> NativeExtent:
    """Median pixel, slices as thin as the lowest level has them, and as many voxels as the median image is long.

    Args:
        spacings: mm, one triple for each case, in the axis order of the plans.
        shapes: voxels, alike.
    """
    turned = [depth_first(spacing) for spacing in spacings]
    extents = [_extent(*pair) for pair in zip(spacings, shapes, strict=True)]
    most = max(len(spacing) for spacing in turned)  # pixels of photographs say nothing about the volumes beside them
    chosen = [index for index, spacing in enumerate(turned) if len(spacing) == most]
    height, width = (float(value) for value in np.median([turned[index][-2:] for index in chosen], 0))
    long, high, wide = (float(value) for value in np.median([extents[index] for index in chosen], 0))
    if most == 2:
        return NativeExtent((height, width), (high / height, wide / width))
    anisotropies = [Anisotropy.from_spacing(turned[index]) for index in chosen]
    lowest = min(anisotropy.level for anisotropy in anisotropies)
    ratio = float(np.median([anisotropy.ratio for anisotropy in anisotropies if anisotropy.level == lowest]))
    depth = ratio * min(height, width)
    return NativeExtent((depth, height, width), (max(long / depth, 1.0), high / height, wide / width))


def native_configuration(configuration: dict[str, Any], extent: NativeExtent) -> dict[str, Any]:
    """Make a configuration that was planned for ``extent`` one without resampling, for images that bring their spacing.

    2D images are volumes of one slice here.
    """
    spacing, shape, patch = extent.spacing, extent.shape, configuration["patch_size"]
    architecture = configuration["architecture"]
    arch_kwargs, umit = {**architecture["arch_kwargs"], "native": True}, configuration["umit"]
    if len(spacing) == 2:
        spacing, shape, patch = (NO_DEPTH * min(spacing), *spacing), (1.0, *shape), [1, *patch]
        arch_kwargs["strides"] = [[1, *stride] for stride in arch_kwargs["strides"]]
        umit = {name: _of_volume(section) for name, section in umit.items()}
    kinds = ("data", "seg", "probabilities")
    return {
        **configuration,
        "patch_size": patch,
        "architecture": {**architecture, "arch_kwargs": {**arch_kwargs, "spacing": list(spacing)}},
        "umit": umit,
        "preprocessor_name": "UMITNativePreprocessor",
        "median_image_size_in_voxels": list(shape),
        "spacing": list(spacing),
        "batch_dice": math.prod(patch) / math.prod(shape) < SMALL_PATCH,
        **{f"resampling_fn_{kind}": "no_resampling_hack" for kind in kinds},
        **{f"resampling_fn_{kind}_kwargs": {} for kind in kinds},
    }


def _of_volume(section: Any) -> Any:
    """A section of the umit block that was planned for slices: its axes are those of a volume."""
    if not isinstance(section, dict) or section.get("mirror_axes") is None:
        return section
    return {**section, "mirror_axes": [axis + 1 for axis in section["mirror_axes"]]}


def thick_first(spacing: Sequence[float], values: Sequence[float]) -> list[float]:
    """Values per axis, that of the thick axis first."""
    others = list(values)
    return [others.pop(thick_axis(spacing)), *others]


def _extent(spacing: Sequence[float], shape: Sequence[float]) -> list[float]:
    """Millimetres of an image along its thick axis and the two others."""
    return thick_first(spacing, [step * size for step, size in zip(spacing, shape, strict=True)])


def crop_shape(patch: Sequence[int], planned: Anisotropy, spacing: Sequence[float]) -> tuple[int, int, int]:
    """Voxels to cut from an image with ``spacing`` (mm, in any axis order), thick axis first.

    Equal physical extent: each level above the planned one halves the slices; 2D images have one.

    Args:
        patch: the plan's patch (depth, height, width).
        planned: anisotropy that the patch was planned for.
    """
    anisotropy = Anisotropy.from_spacing(depth_first(spacing))
    depth = 1 if anisotropy.planar else max(round(patch[0] * 2.0 ** (planned.level - anisotropy.level)), 1)
    return depth, patch[1], patch[2]
