"""Images with thicker slices than they were taken with, and what becomes of predictions and labels on their grid.

Everything here is arithmetic on arrays in nibabel's axis order (x, y, z); ``slices`` is how many become one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np

AXES = "xyz"
NEARLY = 0.02  # share by which a spacing may differ from the one it is said to be
MATCHING = 0.999  # share of voxels whose label must be the most probable class; ties and float16 cost a few


class Condition(NamedTuple):
    """A slice thickness in mm, and the axis (0 to 2) it is along; None for the image as it is."""

    mm: int
    axis: int | None = None

    @property
    def name(self) -> str:
        return f"{self.mm}mm" + ("" if self.axis is None else f"_{AXES[self.axis]}")


def conditions(thicknesses: Sequence[int]) -> list[Condition]:
    """The image as it is (1 mm), then every thickness along every axis."""
    return [Condition(1)] + [Condition(mm, axis) for mm in thicknesses if mm > 1 for axis in range(3)]


def thicken(volume: np.ndarray, axis: int, slices: int) -> np.ndarray:
    """Averages of blocks of slices. Where the last block is short, the last slice is repeated, so none is lost.

    Args:
        volume: (X, Y, Z).
        axis: 0 to 2.
        slices: 1 or more.

    Returns:
        float32, with ``ceil(size / slices)`` slices along the axis.
    """
    return _blocks(volume, axis, slices).mean(axis + 1, dtype=np.float64).astype(np.float32)


def class_shares(label: np.ndarray, classes: int, condition: Condition) -> np.ndarray:
    """(X, Y, Z) -> (K, x, y, z): how much of every thick voxel belongs to each class; one-hot at 1 mm."""
    hot = np.stack([label == value for value in range(classes)]).astype(np.float32)
    return hot if condition.axis is None else np.stack([thicken(each, condition.axis, condition.mm) for each in hot])


def _blocks(volume: np.ndarray, axis: int, slices: int) -> np.ndarray:
    """A view with the slices of each block in a new axis behind ``axis``."""
    if slices < 1 or volume.ndim != 3 or not 0 <= axis < 3:
        raise ValueError(f"cannot join {slices} slices along axis {axis} of an array of shape {volume.shape}")
    margin = [(0, 0)] * 3
    margin[axis] = (0, -volume.shape[axis] % slices)
    padded = np.pad(volume, margin, mode="edge")
    shape = padded.shape
    return padded.reshape(*shape[:axis], shape[axis] // slices, slices, *shape[axis + 1 :])


def thick_affine(affine: np.ndarray, axis: int, slices: int) -> np.ndarray:
    """Affine of the thickened image: the spacing is multiplied, and the first voxel lies in the centre of its block."""
    step = np.eye(4)
    step[axis, axis] = slices
    step[axis, 3] = (slices - 1) / 2
    return affine @ step


def repeat_back(prediction: np.ndarray, condition: Condition, shape: Sequence[int]) -> np.ndarray:
    """Labels on the thick grid, brought to the original one: every slice is repeated, what was padded is cut.

    Raises:
        ValueError: the prediction does not have the shape of a thickened image of ``shape``.
    """
    _check_grid(prediction.shape, condition, shape)
    if condition.axis is None:
        return prediction
    return np.take(np.repeat(prediction, condition.mm, condition.axis), range(shape[condition.axis]), condition.axis)


def interpolate_back(probabilities: np.ndarray, condition: Condition, shape: Sequence[int]) -> np.ndarray:
    """(K, x, y, z) on the thick grid -> the most probable class (X, Y, Z) on the original one.

    Linear between the centres of the thick slices, constant beyond the outer ones.

    Raises:
        ValueError: as `repeat_back`.
    """
    _check_grid(probabilities.shape[1:], condition, shape)
    if condition.axis is not None:
        axis, last = condition.axis + 1, probabilities.shape[condition.axis + 1] - 1
        place = np.clip((np.arange(shape[condition.axis]) + 0.5) / condition.mm - 0.5, 0, last)
        lower = np.minimum(place.astype(int), max(last - 1, 0))
        share = (place - lower).reshape([-1 if each == axis else 1 for each in range(4)])
        upper = np.minimum(lower + 1, last)
        probabilities = np.take(probabilities, lower, axis) * (1 - share) + np.take(probabilities, upper, axis) * share
    return probabilities.argmax(0).astype(np.int16)


def _check_grid(found: Sequence[int], condition: Condition, shape: Sequence[int]) -> None:
    expected = tuple(-(-size // condition.mm) if axis == condition.axis else size for axis, size in enumerate(shape))
    if tuple(found) != expected:
        raise ValueError(f"a prediction of shape {tuple(found)} is not on the thick grid {expected}")


def thicken_file(source: Path, target: Path, condition: Condition) -> None:
    """Write a thickened NIfTI file; the image as it is becomes a link.

    Raises:
        ValueError: the spacing along the axis is not 1 mm.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if condition.axis is None:
        if not target.exists():
            target.symlink_to(source.resolve())
        return
    image = nibabel.Nifti1Image.from_filename(source)
    spacing = float(image.header.get_zooms()[condition.axis])
    if abs(spacing - 1) > NEARLY:
        raise ValueError(f"{source.name} has {spacing:g} mm along {AXES[condition.axis]}; this benchmark needs 1 mm")
    volume = thicken(np.asarray(image.dataobj, np.float32), condition.axis, condition.mm)
    made = nibabel.Nifti1Image(volume, thick_affine(image.affine, condition.axis, condition.mm))
    made.header.set_xyzt_units("mm")
    made.set_sform(made.affine, 1)
    made.set_qform(made.affine, 1)
    nibabel.save(made, target)


def read_label(file: Path) -> np.ndarray:
    """A label map as integers; nibabel refuses a truncated file."""
    return np.asarray(nibabel.Nifti1Image.from_filename(file).dataobj).round().astype(np.int16)


def read_probabilities(file: Path, labels: np.ndarray) -> np.ndarray:
    """nnU-Net's ``.npz`` of a prediction as (K, x, y, z).

    Args:
        labels: (x, y, z), what nnU-Net wrote beside it; tells which of the two axis orders of its readers it has.

    Raises:
        ValueError: the labels are not the most probable classes in either order.
    """
    stored = np.load(file)["probabilities"].astype(np.float32)
    for order in ((0, 1, 2, 3), (0, 3, 2, 1)):
        turned = stored.transpose(order)
        if turned.shape[1:] == labels.shape and (turned.argmax(0) == labels).mean() > MATCHING:
            return turned
    raise ValueError(f"{file.name} of shape {stored.shape} does not belong to labels of shape {labels.shape}")


def dice(prediction: np.ndarray, truth: np.ndarray, label: int) -> float:
    """Dice of one class; NaN where neither has it, as in nnU-Net."""
    found, wanted = prediction == label, truth == label
    total = int(found.sum()) + int(wanted.sum())
    return 2 * int((found & wanted).sum()) / total if total else math.nan


def mean_dice(cases: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Mean over the cases of each class, then over the classes (nnU-Net's foreground mean); NaN counts in neither."""
    if not cases:
        raise ValueError("no case was scored")
    labels = list(next(iter(cases.values())))
    per_class = {label: float(np.nanmean([case[label] for case in cases.values()])) for label in labels}
    return {"mean": float(np.mean(list(per_class.values()))), "per_class": per_class, "cases": len(cases)}
