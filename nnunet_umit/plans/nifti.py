"""A NIfTI file read as bytes: does it hold what its header declares, and are its numbers finite?

Needed because SimpleITK does not ask: it fills a truncated file up with zeros, and reads NaN and infinity as zero,
which in CT is water.
"""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

_CHUNK = 1 << 20  # bytes, a multiple of every number size
_HEADER_BYTES = 540  # the longer of the two headers (NIfTI-1: 348, NIfTI-2: 540)
_FLOATS = {16: "f4", 64: "f8"}  # NIfTI data type codes that can hold NaN


@dataclass(frozen=True)
class Header:
    """What a header declares: shape (x, y, z, ...), bytes before the voxels, bytes of one number and of all voxels."""

    shape: tuple[int, ...]
    offset: int
    item_bytes: int
    voxel_bytes: int
    float_type: str | None

    @classmethod
    def parse(cls, start: bytes) -> Header | None:
        """From the first bytes of a file; None when they are no sensible NIfTI-1 or NIfTI-2 header."""
        for order in "<>":
            if len(start) >= 348 and struct.unpack_from(order + "i", start, 0)[0] == 348:
                dims = struct.unpack_from(order + "8h", start, 40)
                kind, bits = struct.unpack_from(order + "2h", start, 70)
                offset = struct.unpack_from(order + "f", start, 108)[0]
                if start[344:347] == b"ni1":
                    bits = 0  # header and voxels in two files: only the header is here
            elif len(start) >= 540 and struct.unpack_from(order + "i", start, 0)[0] == 540:
                dims = struct.unpack_from(order + "8q", start, 16)
                kind, bits = struct.unpack_from(order + "2h", start, 12)
                offset = struct.unpack_from(order + "q", start, 168)[0]
            else:
                continue
            if not 1 <= dims[0] <= 7 or any(size < 1 for size in dims[1 : dims[0] + 1]):
                return None
            if not math.isfinite(offset) or offset < 0 or bits < 0:
                return None
            shape = tuple(int(size) for size in dims[1 : dims[0] + 1])
            float_type = order + _FLOATS[kind] if bits and kind in _FLOATS else None
            return cls(shape, int(offset), max(bits // 8, 1), (math.prod(shape) * bits + 7) // 8, float_type)
        return None


def scan(handle: BinaryIO | gzip.GzipFile) -> str | None:
    """Read a file from its start and say what is wrong with it, or None."""
    start = handle.read(_HEADER_BYTES)
    header = Header.parse(start)
    if header is None:
        return f"no NIfTI header in its first {len(start)} bytes"
    pending = start[header.offset :]
    handle.read(max(header.offset - len(start), 0))
    held = 0
    while chunk := pending + handle.read(_CHUNK - len(pending)):
        pending = b""
        wanted = chunk[: header.voxel_bytes - held]
        if header.float_type is not None:
            numbers = np.frombuffer(wanted[: len(wanted) // header.item_bytes * header.item_bytes], header.float_type)
            finite = np.isfinite(numbers)
            if not finite.all():
                place = int(np.argmin(finite))
                index = np.unravel_index(held // header.item_bytes + place, header.shape, order="F")
                where = tuple(int(i) for i in index)
                return f"voxel {where} (x, y, z) is {numbers[place]}; all must be finite (numpy.nan_to_num mends them)"
        held += len(wanted)
    if held < header.voxel_bytes:
        text = " x ".join(map(str, header.shape))
        return f"truncated: the header declares {text} voxels = {header.voxel_bytes} bytes, the file holds {held}"
    return None
