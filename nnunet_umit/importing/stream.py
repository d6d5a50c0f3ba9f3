"""Voxels read as a stream: a verdict on every one of them in a megabyte of memory.

It answers in one pass what would otherwise need the decoded image: does the checksum hold, are there as many bytes as
the header declares, is every number finite, do they differ, and which other file holds the same.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nnunet_umit.importing.headers import Declared
from nnunet_umit.importing.verdict import Kind, RejectedError

_CHUNK = 1 << 20  # bytes
_SLACK = 512  # decoded bytes after the last voxel that are taken for padding
_AGAIN = "Copy it again from its source"


@dataclass(frozen=True)
class Scan:
    """What the voxels of one image are: smallest and largest stored value, and a hash of type, shape and content."""

    low: float
    high: float
    digest: str


def scan(path: str, declared: Declared) -> Scan:
    """Read all voxels of a volume once.

    Raises:
        RejectedError: Damaged compression, fewer or more bytes than declared, a voxel that is not finite, constant.
        OSError: From the file system.
    """
    tally = Tally(declared.shape, declared.dtype)
    left = declared.skip
    with decoding(declared.encoding), open(path, "rb") as handle:
        handle.seek(declared.start)
        for chunk in _decoded(handle, declared.encoding):
            dropped = min(left, len(chunk))
            left -= dropped
            tally.add(chunk[dropped:])
    return tally.finish()


@contextmanager
def decoding(encoding: str) -> Iterator[None]:
    """What a decoder raises within becomes a rejection.

    Raises:
        RejectedError: For a stream that ends early, is damaged, or fails its checksum.
    """
    try:
        yield
    except EOFError as error:
        raise RejectedError(Kind.COMPRESSION, f"truncated: the {encoding} stream ends early", _AGAIN) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise RejectedError(Kind.COMPRESSION, f"damaged {encoding} stream ({error})", _AGAIN) from error


class Tally:
    """Counts, checks and hashes voxels that arrive as bytes, x fastest.

    Args:
        shape: Sizes, x first.
        dtype: Type of a voxel with its byte order; the hash is of little-endian bytes.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
        self.expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
        self.held = 0  # bytes, of which whole voxels are looked at
        self._rest = b""
        self._low, self._high = np.inf, -np.inf
        self._hash = hashlib.blake2b(repr((shape, dtype.newbyteorder("<").str)).encode(), digest_size=16)

    def add(self, chunk: bytes) -> None:
        """Take the next bytes; stops reading early, by raising, as soon as there are too many."""
        surplus = self.held + len(chunk) - self.expected
        if surplus > _SLACK:
            reason = f"the header declares {self._text()}, the file holds at least {surplus} bytes more"
            raise RejectedError(Kind.BYTES, reason, "Export the image again from its source")
        chunk = chunk[: self.expected - self.held]
        self.held += len(chunk)
        chunk = self._rest + chunk
        whole = len(chunk) // self.dtype.itemsize * self.dtype.itemsize
        self._rest = chunk[whole:]
        numbers = np.frombuffer(chunk[:whole], self.dtype)
        if numbers.size:
            self._look_at(numbers)
            self._hash.update(numbers.astype(self.dtype.newbyteorder("<"), copy=False).tobytes())

    def finish(self) -> Scan:
        """The result, after the last byte.

        Raises:
            RejectedError: When bytes are missing, or all voxels are equal.
        """
        if self.held < self.expected:
            reason = f"truncated: the header declares {self._text()}, the file holds {self.held}"
            raise RejectedError(Kind.BYTES, reason, _AGAIN)
        if self._low == self._high:
            fix = "Export the image again, or remove it"
            raise RejectedError(Kind.CONSTANT, f"every voxel has the same value ({self._low:g})", fix)
        return Scan(self._low, self._high, self._hash.hexdigest())

    def _look_at(self, numbers: NDArray[Any]) -> None:
        low, high = float(numbers.min()), float(numbers.max())  # NaN and infinity come through as one of the two
        if not (np.isfinite(low) and np.isfinite(high)):
            place = int(np.argmin(np.isfinite(numbers)))
            first = (self.held - len(self._rest)) // self.dtype.itemsize - numbers.size
            index = tuple(int(i) for i in np.unravel_index(first + place, self.shape, order="F"))
            reason = f"voxel {index} (x, y, z) is {numbers[place]}; every voxel must be finite"
            raise RejectedError(Kind.NON_FINITE, reason, "Set such voxels to the background (numpy.nan_to_num)")
        self._low, self._high = min(self._low, low), max(self._high, high)

    def _text(self) -> str:
        return f"{' x '.join(map(str, self.shape))} voxels of {self.dtype.name} = {self.expected} bytes"


def tally_array(array: NDArray[Any], shape: tuple[int, ...]) -> Scan:
    """The same checks and the same hash for an image that is in memory; `shape` is x first (and colour before it).

    Raises:
        RejectedError: For a voxel that is not finite, or when all are equal.
    """
    tally = Tally(shape, array.dtype)
    for part in array if array.ndim > 2 else [array]:
        tally.add(np.ascontiguousarray(part).tobytes())
    return tally.finish()


def _decoded(handle: BinaryIO, encoding: str) -> Iterator[bytes]:
    """Decoded bytes in pieces of at most `_CHUNK`, however well they were compressed."""
    if encoding == "zlib":
        yield from _inflated(handle)
        return
    reader: Any = handle
    if encoding == "gzip":
        reader = gzip.GzipFile(fileobj=handle)
    elif encoding == "bzip2":
        reader = bz2.BZ2File(handle)
    while chunk := reader.read(_CHUNK):
        yield chunk


def _inflated(handle: BinaryIO) -> Iterator[bytes]:
    stream = zlib.decompressobj()
    while not stream.eof:
        packed = stream.unconsumed_tail or handle.read(_CHUNK // 8)
        if not packed:
            raise EOFError("the zlib stream ends before its end marker")
        if chunk := stream.decompress(packed, _CHUNK):
            yield chunk
