"""Which axes may be mirrored: those along which no two classes keep their order.

Mirroring a heart swaps its ventricles. Where the labels of a dataset are told apart by where they lie (left and right
kidney, anterior and posterior hippocampus), a mirrored image has them in an order that no patient has: a network has to
learn them from shape alone, and test-time mirroring asks it about impossible anatomy. nnU-Net mirrors all axes unless
the user picks another trainer; here the labels decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 5  # cases that must hold both classes of a pair
CONSISTENT = 0.95  # share of the cases that must agree
APART = 0.15  # median distance of the centres, as a share of the foreground's extent


@dataclass(frozen=True)
class Orientation:
    """Axes that may be mirrored, of (D, H, W) arrays in the axis order of the plans, and why the others may not."""

    mirrored: tuple[int, ...]
    why: tuple[str, ...] = ()

    def of_slices(self) -> Orientation:
        """The same for images (H, W) within the first axis."""
        return Orientation(tuple(axis - 1 for axis in self.mirrored if axis > 0), self.why)


def labelled(label: np.ndarray, classes: Sequence[int | Sequence[int]]) -> np.ndarray:
    """Places (N, 3) of the voxels of a label map (D, H, W) that belong to any class."""
    values = [value for region in classes for value in ([region] if isinstance(region, int) else region)]
    return np.argwhere(np.isin(label, values))


def centres(
    label: np.ndarray, classes: Sequence[int | Sequence[int]], places: np.ndarray | None = None
) -> dict[int, np.ndarray]:
    """Centre of every class (by its position in ``classes``) in a label map (D, H, W), as a share of the extent of all
    of them along each axis, 0 to 1.

    Args:
        classes: label values; several values are a region, which is their union.
        places: of its :func:`labelled` voxels, where they are known.
    """
    places = labelled(label, classes) if places is None else places
    if not len(places):
        return {}
    values, low, high = label[tuple(places.T)], places.min(0), places.max(0) + 1
    found = {}
    for index, region in enumerate(classes):
        own = places[np.isin(values, region)]
        if len(own):
            found[index] = (own.mean(0) + 0.5 - low) / (high - low)
    return found


def orientation(names: Sequence[str], found: Sequence[Mapping[int, np.ndarray]]) -> Orientation:
    """Decide from the :func:`centres` of some cases; ``names`` of the classes are for the reasons."""
    mirrored, reasons = [], []
    for axis in range(3):
        pair = _ordered_pair(found, axis, len(names))
        if pair is None:
            mirrored.append(axis)
        else:
            reasons.append(f"{names[pair[0]]} comes before {names[pair[1]]} along axis {axis}")
    return Orientation(tuple(mirrored), tuple(reasons))


def _ordered_pair(cases: Sequence[Mapping[int, np.ndarray]], axis: int, classes: int) -> tuple[int, int] | None:
    """The pair of classes that lies furthest apart along an axis, in the order that (nearly) every case has."""
    best, chosen = 0.0, None
    for one, other in itertools.combinations(range(classes), 2):
        steps = np.array([case[other][axis] - case[one][axis] for case in cases if one in case and other in case])
        if len(steps) < FEWEST:
            continue
        agreeing, apart = max(np.mean(steps > 0), np.mean(steps < 0)), abs(float(np.median(steps)))
        if agreeing >= CONSISTENT and apart >= max(APART, best):
            best, chosen = apart, (one, other) if np.median(steps) > 0 else (other, one)
    return chosen
