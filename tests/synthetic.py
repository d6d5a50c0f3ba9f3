"""Tiny nnU-Net raw data sets, made in a second: a bright ball (label 1) and a dim box (label 2) in noise.

Axis order is nnU-Net's everywhere: (z, y, x) for volumes and their spacing in millimetres, (y, x) for pictures.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import SimpleITK as sitk

Corruption = Literal["truncated", "empty", "nan", "inf", "constant", "label", "shape", "no_label", "no_image"]

LABELS = {"background": 0, "ball": 1, "box": 2}


def draw_case(
    shape: Sequence[int], spacing: Sequence[float], channels: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One image (channels, *shape) float32 and its label map (*shape) uint8; the ball is round in millimetres."""
    extent = np.asarray(shape) * np.asarray(spacing)
    grids = np.meshgrid(*[(np.arange(n) + 0.5) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij")
    centre = extent * rng.uniform(0.3, 0.4, len(shape))
    radius = max(0.18 * float(extent.min()), 1.5 * max(spacing))  # also seen by the thickest slices
    ball = sum((grid - middle) ** 2 for grid, middle in zip(grids, centre, strict=True)) <= radius**2
    corner = rng.uniform(0.6, 0.65, len(shape))
    box = np.ones(shape, dtype=bool)
    for axis, grid in enumerate(grids):
        box &= (grid >= corner[axis] * extent[axis]) & (grid <= (corner[axis] + 0.25) * extent[axis])
    label = np.zeros(shape, dtype=np.uint8)
    label[box] = LABELS["box"]
    label[ball] = LABELS["ball"]
    contrast = np.asarray([0.0, 300.0, 150.0], dtype=np.float32)[label]
    signs = [1.0 if channel % 2 == 0 else -1.0 for channel in range(channels)]
    image = np.stack([500.0 + sign * contrast + rng.normal(0.0, 40.0, shape) for sign in signs])
    return image.astype(np.float32), label


def _write_volume(path: Path, array: np.ndarray, spacing: Sequence[float]) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(value) for value in reversed(spacing)])
    sitk.WriteImage(image, str(path))


def _corrupt_image(image: np.ndarray, how: Corruption | None) -> np.ndarray:
    image = image.copy()
    if how == "nan":
        image[..., 3:5, 3:5] = np.nan
    elif how == "inf":
        image[..., 4, 4] = np.inf
    elif how == "constant":
        image[...] = 100.0
    elif how == "shape":
        image = image[..., :-3]
    return image


def make_dataset(
    root: Path,
    *,
    number: int = 901,
    name: str = "Balls",
    cases: int = 5,
    test_cases: int = 0,
    shape: Sequence[int] = (28, 36, 32),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    channels: int = 1,
    channel_names: Sequence[str] | None = None,
    corruptions: Mapping[int, Corruption] | None = None,
    seed: int = 0,
) -> Path:
    """Write ``root/Dataset<number>_<name>`` and return it.

    Args:
        root: The ``nnUNet_raw`` folder; made where missing.
        number: Data set number, 1 to 999.
        name: What follows the number.
        cases: Training cases, ``case_000`` and so on, in ``imagesTr`` and ``labelsTr``.
        test_cases: Further cases ``test_000`` ... in ``imagesTs`` and ``labelsTs``.
        shape: Voxels, (z, y, x) for ``.nii.gz`` volumes or (y, x) for ``.png`` pictures.
        spacing: Millimetres per axis of a volume; pictures have none, nnU-Net takes 1 for them.
        channels: Image channels, one file each (a PNG holds them all: 1 or 3).
        channel_names: Names for dataset.json, ``["CT"]`` for instance; default ``MRI0``, ``MRI1`` ...
        corruptions: Training case number -> what to break. ``truncated`` and ``empty``: bytes of the first image file;
            ``nan``, ``inf``, ``constant``: voxels; ``shape``: image smaller than its label; ``label``: a value that
            dataset.json does not know; ``no_label``, ``no_image``: the file is missing.
        seed: The same seed gives the same voxels.

    Raises:
        ValueError: an unknown corruption, or one that pictures cannot hold.
    """
    planar = len(shape) == 2
    corruptions = dict(corruptions or {})
    for how in corruptions.values():
        if how not in get_args(Corruption) or (planar and how in ("nan", "inf")):
            raise ValueError(f"unknown corruption {how!r} for {'pictures' if planar else 'volumes'}")
    if planar and channels not in (1, 3):
        raise ValueError(f"a PNG holds 1 or 3 channels, not {channels}")
    ending = ".png" if planar else ".nii.gz"
    folder = Path(root) / f"Dataset{number:03d}_{name}"
    rng = np.random.default_rng(seed)
    spacing = (1.0, 1.0) if planar else spacing
    for suffix, prefix, count in (("Tr", "case", cases), ("Ts", "test", test_cases)):
        for index in range(count):
            image, label = draw_case(shape, spacing, channels, rng)
            how = corruptions.get(index) if suffix == "Tr" else None
            _write_case(folder, suffix, f"{prefix}_{index:03d}", image, label, spacing, planar, how)
    names = list(channel_names or [f"MRI{channel}" for channel in range(channels)])
    description = {
        "channel_names": {str(index): channel for index, channel in enumerate(names)},
        "labels": LABELS,
        "numTraining": cases,
        "file_ending": ending,
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))
    return folder


def _write_case(
    folder: Path,
    suffix: str,
    case: str,
    image: np.ndarray,
    label: np.ndarray,
    spacing: Sequence[float],
    planar: bool,
    how: Corruption | None,
) -> None:
    images, labels = folder / f"images{suffix}", folder / f"labels{suffix}"
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    image = _corrupt_image(image, how)
    if how == "label":
        label = np.where(label == 2, 7, label).astype(np.uint8)
    if planar:
        files = [images / f"{case}_0000.png"]
        picture = np.clip(image / 4.0, 0, 255).astype(np.uint8)
        pixels = picture[0] if len(picture) == 1 else np.moveaxis(picture, 0, -1)
        sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=pixels.ndim == 3), str(files[0]))
        sitk.WriteImage(sitk.GetImageFromArray(label), str(labels / f"{case}.png"))
    else:
        files = [images / f"{case}_{channel:04d}.nii.gz" for channel in range(len(image))]
        for file, volume in zip(files, image, strict=True):
            _write_volume(file, volume, spacing)
        _write_volume(labels / f"{case}.nii.gz", label, spacing)
    if how == "truncated":
        files[0].write_bytes(files[0].read_bytes()[: files[0].stat().st_size // 2])
    elif how == "empty":
        files[0].write_bytes(b"")
    elif how == "no_image":
        files[0].unlink()
    elif how == "no_label":
        (labels / f"{case}{'.png' if planar else '.nii.gz'}").unlink()
