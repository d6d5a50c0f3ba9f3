"""Volumes and DICOM series into memory, after their headers and bytes have been found to be right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from nnunet_umit.importing.dicom import DIRECTIONS, POSITION, SAME_WAY, numbers
from nnunet_umit.importing.formats import Format
from nnunet_umit.importing.headers import declared
from nnunet_umit.importing.stream import decoding, scan, tally_array
from nnunet_umit.importing.verdict import Candidate, Kind, RejectedError

SMALLEST = 8  # voxels along the two longer axes: less than one token of the smallest kind squared is no image
SPACING_LIMITS = (1e-4, 1e3)  # mm; from a light microscope to a mistake
_UNEVEN = 0.05  # share of the distance of slices by which one of them may differ
_TILT = 0.02  # sideways shift of a stack as a share of its height, above which it is sheared (gantry tilt)


@dataclass(frozen=True)
class Loaded:
    """An image in memory, with what its case will say about it. Axis order (z, y, x); a picture has one slice.

    Args:
        voxels_ZYX: One channel; the mean of the channels of a colour picture.
        reference: The image whose geometry the body mask takes over; None for a picture, which has none.
    """

    voxels_ZYX: NDArray[Any]
    spacing: tuple[float, float, float]
    channels: int
    low: float
    high: float
    digest: str
    reader: str
    reference: sitk.Image | None


def check_size(voxels: int, limit: int) -> None:
    """Refuse an image before anything is allocated for it.

    Raises:
        RejectedError: When it declares more than `limit` voxels.
    """
    if voxels > limit:
        reason = f"its header declares {voxels} voxels; the limit is {limit}"
        raise RejectedError(Kind.TOO_LARGE, reason, "Raise --max-voxels if that is right, or export the image again")


def check_grid(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    """Refuse a grid that cannot be an image in millimetres; both arguments in the same axis order.

    Raises:
        RejectedError: Naming value and limit.
    """
    low, high = SPACING_LIMITS
    if not all(math.isfinite(step) and low <= step <= high for step in spacing):
        reason = f"spacing {_numbers(spacing)} mm; each must lie between {low:g} and {high:g}"
        raise RejectedError(Kind.GEOMETRY, reason, "Correct the spacing in the header, or export the image again")
    if sorted(shape)[-2] < SMALLEST:
        reason = f"{_numbers(shape)} voxels; two axes must have at least {SMALLEST}"
        raise RejectedError(Kind.GEOMETRY, reason, "Leave it out: it is too small to train on")


def load_volume(candidate: Candidate, kind: Format, max_voxels: int) -> Loaded:
    """A NIfTI, MetaImage or NRRD file: header, then bytes as a stream, then SimpleITK, as nnU-Net will read it.

    Raises:
        RejectedError: For anything wrong with it.
    """
    with decoding("gzip"):
        wanted = declared(candidate.path, kind)
    size = " x ".join(map(str, wanted.shape))
    if not 2 <= len(wanted.shape) <= 3:
        fix = "Split it into one file a time point or channel, or keep one of them"
        raise RejectedError(Kind.DIMENSION, f"{len(wanted.shape)}D ({size}); an image has 2 or 3 dimensions", fix)
    check_size(wanted.voxels, max_voxels)
    digest = scan(candidate.path, wanted).digest  # before SimpleITK, which finds other words for damaged streams
    reader = sitk.ImageFileReader()
    reader.SetFileName(candidate.path)
    with sitk_errors("SimpleITK cannot read the header", Kind.HEADER):
        reader.ReadImageInformation()
    found = (reader.GetSize(), reader.GetNumberOfComponents())
    if math.prod(found[0]) != wanted.voxels or found[1] != 1 or len(found[0]) > 3:
        reason = f"the header declares {size} voxels of one channel, SimpleITK finds {found[0]} of {found[1]}"
        raise RejectedError(Kind.HEADER, reason, "Convert it to a plain .nii.gz file with one channel")
    check_grid(reader.GetSize(), reader.GetSpacing())
    with sitk_errors("SimpleITK cannot read the voxels", Kind.CRASH):
        image = reader.Execute()
    return from_sitk(image, digest)


def from_sitk(image: sitk.Image, digest: str) -> Loaded:
    """An image that SimpleITK has read, with the numbers that nnU-Net will see (scaled, if the header says so)."""
    view = sitk.GetArrayViewFromImage(image)
    low, high = float(view.min()), float(view.max())
    limit = float(np.finfo(np.float32).max)  # nnU-Net's type; NaN and infinity fail the comparison as well
    if not (-limit <= low < high <= limit):
        kind = Kind.CONSTANT if low == high else Kind.NON_FINITE
        reason = f"voxels lie between {low:g} and {high:g} once read; they must be finite in float32 and differ"
        raise RejectedError(kind, reason, "Export the image again from its source")
    spacing = tuple(float(step) for step in reversed(image.GetSpacing()))
    if view.ndim == 2:
        spacing = (999 * max(spacing), *spacing)  # what nnU-Net's reader says of the missing axis
    return Loaded(
        voxels_ZYX=view if view.ndim == 3 else view[None],
        spacing=(spacing[0], spacing[1], spacing[2]),
        channels=1,
        low=low,
        high=high,
        digest=digest,
        reader="SimpleITKIO",
        reference=image,
    )


def load_series(candidate: Candidate, max_voxels: int) -> Loaded:
    """A DICOM series, whose slices must be evenly spaced: ITK only warns of a missing one and stretches the rest.

    Raises:
        RejectedError: For anything wrong with it.
    """
    names = [str(Path(candidate.path, name)) for name in candidate.files]
    first = sitk.ImageFileReader()
    first.SetFileName(names[0])
    with sitk_errors("SimpleITK cannot read the first slice", Kind.HEADER):
        first.ReadImageInformation()
    if first.GetNumberOfComponents() != 1:
        reason = f"{first.GetNumberOfComponents()} colours a pixel"
        raise RejectedError(Kind.FORMAT, f"DICOM series with {reason}", "Save its pictures as PNG and import those")
    if first.GetDimension() > 2 and first.GetSize()[2] > 1:
        reason = f"multi-frame DICOM of {first.GetSize()[2]} frames: slices, moments or echoes, which ITK does not tell"
        raise RejectedError(Kind.DIMENSION, reason, "Convert it (dcm2niix does), and import what comes out")
    check_size(math.prod(first.GetSize()) * len(names), max_voxels)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(names)
    reader.MetaDataDictionaryArrayUpdateOn()
    with sitk_errors(f"SimpleITK cannot read the series of {len(names)} files", Kind.CRASH):
        image = reader.Execute()
    if len(names) > 1:
        positions, directions = (
            np.array([_vector(reader, index, tag, count) for index in range(len(names))])
            for tag, count in ((POSITION, 3), (DIRECTIONS, 6))
        )
        check_slices(positions, directions)
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    if image.GetDimension() != 3:
        raise RejectedError(Kind.DIMENSION, f"DICOM with size {image.GetSize()}", "Export one volume a series")
    check_grid(image.GetSize(), image.GetSpacing())
    array = sitk.GetArrayViewFromImage(image)
    return from_sitk(image, tally_array(array, image.GetSize()).digest)


def check_slices(positions_S3: NDArray[np.float64], directions_S6: NDArray[np.float64]) -> None:
    """Refuse slices that are not evenly spaced along their normal.

    Args:
        positions_S3: Image Position (Patient) of each slice in the order of the volume, mm.
        directions_S6: Image Orientation (Patient) of each slice: directions of a row and of a column.

    Raises:
        RejectedError: Slices that look in several directions, repeated positions, gaps, or a stack that leans.
    """
    if not np.allclose(directions_S6, directions_S6[0], atol=SAME_WAY):
        ways = len(np.unique(directions_S6.round(2), axis=0))
        reason = f"its {len(positions_S3)} slices look in {ways} directions (a localizer?)"
        raise RejectedError(Kind.DIMENSION, reason, "Export each direction as a series of its own, or leave it out")
    normal = np.cross(directions_S6[0, :3], directions_S6[0, 3:])
    along = positions_S3 @ normal
    places = np.sort(along)
    gaps = np.diff(places)
    usual = float(np.median(gaps))
    if gaps.min() >= 1e-3 and not (np.all(np.diff(along) > 0) or np.all(np.diff(along) < 0)):
        reason = f"its {len(places)} slices are not in the order of their places"
        raise RejectedError(Kind.GEOMETRY, reason, "Export the series again, or convert it (dcm2niix does)")
    if gaps.min() < 1e-3:
        reason = f"{len(places)} slices at {1 + int(np.sum(gaps >= 1e-3))} positions: several volumes in one series"
        raise RejectedError(Kind.DIMENSION, reason, "Export each time point or echo as a series of its own")
    if np.abs(gaps - usual).max() > _UNEVEN * usual:
        reason = (
            f"slices are {gaps.min():g} to {gaps.max():g} mm apart, usually {usual:g}: some are missing or irregular"
        )
        raise RejectedError(Kind.GEOMETRY, reason, "Restore the missing slices, or export the series again")
    path = positions_S3[int(np.argmax(along))] - positions_S3[int(np.argmin(along))]
    height = float(path @ normal)
    sideways = float(np.linalg.norm(path - height * normal))
    if sideways > _TILT * height:
        reason = f"the stack leans by {sideways:.1f} mm over {height:.1f} mm (gantry tilt)"
        raise RejectedError(Kind.GEOMETRY, reason, "Resample it to a straight grid when converting it (dcm2niix does)")


def _vector(reader: sitk.ImageSeriesReader, index: int, tag: str, count: int) -> tuple[float, ...]:
    text = reader.GetMetaData(index, tag) if reader.HasMetaDataKey(index, tag) else ""
    found = numbers(text, count)
    if found is None:
        reason = f"slice {index} has {text!r} for DICOM tag {tag} (position or orientation)"
        raise RejectedError(Kind.GEOMETRY, reason, "Export the series with its geometry, or leave it out")
    return found


@contextmanager
def sitk_errors(what: str, kind: Kind) -> Iterator[None]:
    """An exception of SimpleITK, whatever its type, becomes a rejection.

    Raises:
        RejectedError: With `what` went wrong and SimpleITK's own words.
    """
    try:
        yield
    except Exception as error:
        raise RejectedError(kind, f"{what} ({plain(error)})", "Export the image again from its source") from error


def plain(error: BaseException) -> str:
    """An exception as one short line; of ITK's only what follows its file names and addresses."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.rpartition("ITK ERROR: ")[2]
    return text if len(text) <= 200 else text[:197] + "..."


def _numbers(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:g}" for value in values)
