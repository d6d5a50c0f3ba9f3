"""What the labels of a dataset tell the planner: which axes may be mirrored, and how far a patch has to reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_umit.plans.native import thick_first
from nnunet_umit.plans.orientation import Orientation, centres, labelled, orientation
from nnunet_umit.spacing import native_spacing

CASES = 24  # labels that are looked at, evenly spaced
PERCENTILE = 95  # of the cases whose foreground is no longer
REACH = 2.0  # a patch need not be longer than so many times the foreground: beyond lies what no label speaks of
SHORTEST = 128  # voxels, the field's usual patch: a small lesion needs surroundings too


@dataclass(frozen=True)
class Foreground:
    """Labelled voxels of some cases.

    Args:
        orientation: axes that may be mirrored, in the order of the plans.
        extents: mm of the box around all labels, in the order of the plans, of every case that has any.
        spacings: mm, alike, as ``3d_native`` has them.
    """

    orientation: Orientation
    extents: tuple[tuple[float, ...], ...] = ()
    spacings: tuple[tuple[float, ...], ...] = ()

    def reach(self, spacing: Sequence[float]) -> tuple[float, ...] | None:
        """Voxels of ``spacing`` (mm; two values: within the slices) that a patch need not exceed; None: not known."""
        return _voxels(self.extents, spacing)

    def native_reach(self, spacing: Sequence[float]) -> tuple[float, ...] | None:
        """The same for images on their own grid, whose thick axis comes first."""
        pairs = zip(self.spacings, self.extents, strict=True)
        return _voxels(tuple(tuple(thick_first(*pair)) for pair in pairs), spacing)


def _voxels(extents: Sequence[Sequence[float]], spacing: Sequence[float]) -> tuple[float, ...] | None:
    if not extents:
        return None
    longest = np.percentile(np.asarray(extents), PERCENTILE, axis=0)[-len(spacing) :]
    return tuple(max(REACH * float(length) / step, SHORTEST) for length, step in zip(longest, spacing, strict=True))


def read_foreground(
    dataset: Mapping[str, Mapping[str, Any]], labels: Mapping[str, Any], reader: type, transpose: Sequence[int]
) -> Foreground:
    """Look at some labels of a raw dataset.

    Args:
        dataset: cases as nnU-Net lists them, each with the path of its ``label``.
        labels: of dataset.json; regions are lists.
        reader: nnU-Net's reader class for these files.
        transpose: axes of the file in the order of the plans.
    """
    names = [name for name, value in labels.items() if name not in ("background", "ignore") and value != 0]
    classes = [labels[name] for name in names]
    files = [case["label"] for case in dataset.values()]
    found, extents, spacings = [], [], []
    for file in files[:: -(-len(files) // CASES)]:
        label, properties = reader().read_seg(file)
        turned = label[0].transpose(transpose)
        places = labelled(turned, classes)
        found.append(centres(turned, classes, places))
        spacing = [float(properties["spacing"][axis]) for axis in transpose]
        if len(places):
            box = places.max(0) + 1 - places.min(0)
            extents.append(tuple(float(size * step) for size, step in zip(box, spacing, strict=True)))
            spacings.append(tuple(native_spacing(spacing, turned.shape)))
    return Foreground(orientation(names, found), tuple(extents), tuple(spacings))
