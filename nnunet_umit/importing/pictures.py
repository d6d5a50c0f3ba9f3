"""PNG and TIFF: size and bytes from the header, then the picture as nnU-Net's ``NaturalImage2DIO`` reads it."""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from skimage import io

from nnunet_umit.importing.formats import Format
from nnunet_umit.importing.loading import Loaded, check_grid, check_size
from nnunet_umit.importing.stream import tally_array
from nnunet_umit.importing.verdict import Candidate, Kind, RejectedError
from nnunet_umit.plans import integrity

SPACING = (999.0, 1.0, 1.0)  # nnU-Net's, for every picture


def load_picture(candidate: Candidate, kind: Format, max_voxels: int) -> Loaded:
    """A grey or colour picture.

    Raises:
        RejectedError: For anything wrong with it.
    """
    (_check_png if kind == "png" else _check_tiff)(candidate.path, max_voxels)
    picture: NDArray[Any] = np.asarray(io.imread(candidate.path))
    if picture.ndim != 2 and (picture.ndim != 3 or picture.shape[-1] not in (3, 4)):
        reason = f"pixels of shape {picture.shape}; wanted (height, width) or three or four colours in a last axis"
        raise RejectedError(Kind.DIMENSION, reason, "Save one picture a file, grey, RGB or RGBA")
    check_grid(picture.shape[:2], SPACING[1:])
    result = tally_array(picture, picture.shape[::-1])
    return Loaded(
        voxels_ZYX=(picture if picture.ndim == 2 else picture.mean(-1, dtype=np.float32))[None],
        spacing=SPACING,
        channels=1 if picture.ndim == 2 else picture.shape[-1],
        low=result.low,
        high=result.high,
        digest=result.digest,
        reader="NaturalImage2DIO",
        reference=None,
    )


def _check_png(path: str, max_voxels: int) -> None:
    problem = integrity.file_problem(path)
    if problem is not None:
        raise RejectedError(Kind.BYTES, problem.reason, problem.fix)
    with open(path, "rb") as handle:
        start = handle.read(26)
    if len(start) < 26 or start[12:16] != b"IHDR":
        raise RejectedError(Kind.HEADER, "PNG without a header chunk (IHDR)", "Save the picture again")
    width, height = struct.unpack_from(">2I", start, 16)
    check_size(width * height, max_voxels)


def _check_tiff(path: str, max_voxels: int) -> None:
    """Sizes and places of all strips or tiles, from the directory; tifffile would fill missing ones with zeros."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        pages, shape = len(tiff.pages), tuple(tiff.series[0].shape)
        parts = zip(page.dataoffsets, page.databytecounts, strict=True)
        end = max((offset + count for offset, count in parts), default=0)
    if pages != 1 or shape != tuple(page.shape):
        reason = f"TIFF of {pages} pages, shape {shape}; a picture has one page"
        raise RejectedError(Kind.DIMENSION, reason, "Convert a stack to .nii.gz with its spacing, or save single pages")
    check_size(int(np.prod(shape, dtype=object)), max_voxels)
    size = os.path.getsize(path)
    if end > size:
        reason = f"truncated: its directory declares pixels up to byte {end}, the file has {size}"
        raise RejectedError(Kind.BYTES, reason, "Copy it again from its source")


def save_mask(mask_ZYX: NDArray[np.uint8], path: str) -> None:
    """Write the mask of a picture, (1, height, width), as a grey PNG of the same size."""
    io.imsave(path, mask_ZYX[0], check_contrast=False)
