"""The voxels that the header of a volume declares: NIfTI, MetaImage (.mha), NRRD.

Nothing here reads further than the header or allocates for what it declares: a header that claims terabytes costs as
much as any other.
"""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nnunet_umit.importing.formats import Format
from nnunet_umit.importing.verdict import Kind, RejectedError
from nnunet_umit.plans import nifti

Encoding = Literal["raw", "gzip", "zlib", "bzip2"]

_EXPORT = "Export or copy the image again from its source"
_HEADER_LIMIT = 1 << 20  # bytes of a text header, or between a NIfTI header and its voxels (extensions)
_NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_META_TYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4"},
    **{"MET_FLOAT": "f4", "MET_DOUBLE": "f8", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8"},
}
_NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    **{"float": "f4", "double": "f8"},
}
_NRRD_ENCODINGS: dict[str, Encoding] = {"raw": "raw", "gz": "gzip", "gzip": "gzip", "bz2": "bzip2", "bzip2": "bzip2"}


@dataclass(frozen=True)
class Declared:
    """Voxels as a header declares them.

    Args:
        shape: Sizes in file order, x first; axes of size 1 at the end are dropped, down to two.
        dtype: One voxel, with its byte order.
        encoding: How the bytes from `start` on are compressed.
        start: Byte of the file where they begin.
        skip: Decoded bytes before the first voxel.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    encoding: Encoding
    start: int
    skip: int = 0

    @property
    def voxels(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.voxels * self.dtype.itemsize


def declared(path: str, kind: Format) -> Declared:
    """Read the header of a volume.

    Raises:
        RejectedError: When there is none, or it declares something that nnU-Net cannot use.
        OSError, EOFError, zlib.error: From the file itself; a damaged gzip stream ends here already.
    """
    if kind == "nifti.gz":
        with gzip.open(path, "rb") as unpacked:
            return _nifti(unpacked.read(540), "gzip")
    with open(path, "rb") as handle:
        if kind == "nifti":
            return _nifti(handle.read(540), "raw")
        text = handle.read(_HEADER_LIMIT)
        return _meta_image(text) if kind == "mha" else _nrrd(text)


def _nifti(start: bytes, encoding: Encoding) -> Declared:
    header = nifti.Header.parse(start)
    if header is None:
        raise RejectedError(Kind.HEADER, "no NIfTI header that makes sense in its first bytes", _EXPORT)
    little = struct.unpack_from("<i", start)[0] in (348, 540)
    order, second = "<" if little else ">", struct.unpack_from("<i" if little else ">i", start)[0] == 540
    magic = start[4:8] if second else start[344:348]
    if magic in (b"ni1\0", b"ni2\0"):
        fix = "Convert the pair of .hdr and .img to one .nii.gz file"
        raise RejectedError(Kind.FORMAT, "half of a NIfTI pair: header and voxels are in two files", fix)
    if magic != (b"n+2\0" if second else b"n+1\0"):
        reason = f"its magic bytes are {magic!r}, those of NIfTI are b'n+{2 if second else 1}\\0'"
        raise RejectedError(Kind.HEADER, reason, _EXPORT)
    kind, bits = struct.unpack_from(order + "2h", start, 12 if second else 70)
    code = _NIFTI_TYPES.get(kind)
    if code is None:
        reason = f"NIfTI voxel type {kind} is not a plain number (colour, complex or unknown)"
        raise RejectedError(Kind.FORMAT, reason, "Convert it to int16 or float32, one channel a file")
    dtype = np.dtype(order + code)
    if bits != 8 * dtype.itemsize:
        raise RejectedError(Kind.HEADER, f"voxel type {dtype.name} with {bits} bits a voxel", _EXPORT)
    lowest = 540 if second else 348
    if not lowest <= header.offset <= _HEADER_LIMIT:
        reason = f"voxels begin at byte {header.offset}; allowed is {lowest} to {_HEADER_LIMIT}"
        raise RejectedError(Kind.HEADER, reason, _EXPORT)
    pixdim = struct.unpack_from(order + ("8d" if second else "8f"), start, 104 if second else 76)
    scale = struct.unpack_from(order + ("2d" if second else "2f"), start, 176 if second else 112)
    for size, step in zip(header.shape[:3], pixdim[1:], strict=False):
        if size > 1 and not (math.isfinite(step) and step > 0):
            reason = f"voxel spacing {', '.join(f'{value:g}' for value in pixdim[1:4])} mm; each must be above 0"
            raise RejectedError(Kind.GEOMETRY, reason, "Correct pixdim in the header, or export the image again")
    if not all(map(math.isfinite, scale)):
        raise RejectedError(Kind.HEADER, f"voxel scale {scale[0]:g}, offset {scale[1]:g}: must be finite", _EXPORT)
    if encoding == "raw":
        return Declared(_trimmed(header.shape), dtype, encoding, start=header.offset)
    return Declared(_trimmed(header.shape), dtype, encoding, start=0, skip=header.offset)


def _meta_image(text: bytes) -> Declared:
    fields: dict[str, str] = {}
    position = 0
    while "ElementDataFile" not in fields:
        end = text.find(b"\n", position)
        key, equals, value = text[position:end].decode("latin-1").partition("=")
        if end < 0 or not equals:
            raise RejectedError(Kind.HEADER, f"MetaImage header without ElementDataFile ({position} bytes)", _EXPORT)
        fields[key.strip()] = value.strip()
        position = end + 1
    if fields["ElementDataFile"] != "LOCAL":
        reason = f"only a header: its voxels are in {fields['ElementDataFile']!r}"
        raise RejectedError(Kind.FORMAT, reason, "Convert header and voxels to one .mha or .nii.gz file")
    dtype = _plain_type(_META_TYPES, fields.get("ElementType", ""), "ElementType")
    if fields.get("ElementNumberOfChannels", "1") != "1" or fields.get("HeaderSize", "0") not in ("0", "-1"):
        reason = f"{fields.get('ElementNumberOfChannels', '1')} channels, HeaderSize {fields.get('HeaderSize', '0')}"
        raise RejectedError(Kind.FORMAT, reason, "Write one channel a file, without a gap after the header")
    if fields.get("BinaryData", "True").lower() != "true":
        raise RejectedError(Kind.FORMAT, "voxels as text (BinaryData = False)", "Save it with BinaryData = True")
    big = "true" in (fields.get(key, "").lower() for key in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"))
    packed = fields.get("CompressedData", "False").lower() == "true"
    shape = _sizes(fields.get("DimSize", ""), fields.get("NDims", ""), "DimSize")
    return Declared(shape, dtype.newbyteorder(">" if big else "<"), "zlib" if packed else "raw", start=position)


def _nrrd(text: bytes) -> Declared:
    ends = [text.find(blank) + len(blank) for blank in (b"\n\n", b"\r\n\r\n") if blank in text]
    if not ends:
        raise RejectedError(
            Kind.HEADER, f"NRRD header without the empty line that ends it ({len(text)} bytes)", _EXPORT
        )
    fields: dict[str, str] = {}
    for line in text[: min(ends)].decode("latin-1").splitlines()[1:]:
        key, colon, value = line.partition(":")
        if colon and not line.startswith("#"):
            fields[key.strip().lower()] = value.strip()
    encoding = _NRRD_ENCODINGS.get(fields.get("encoding", "").lower())
    skips = [key for key in ("line skip", "lineskip", "byte skip", "byteskip") if fields.get(key, "0") != "0"]
    elsewhere = fields.get("data file", fields.get("datafile"))
    if encoding is None or skips or elsewhere is not None:
        found = f"voxels in {elsewhere!r}" if elsewhere else f"encoding {fields.get('encoding')!r}" + ", ".join(skips)
        reason = f"NRRD with {found}; wanted: raw, gzip or bzip2 voxels right after the header"
        raise RejectedError(Kind.FORMAT, reason, "Convert it to one .nrrd or .nii.gz file")
    dtype = _plain_type(_NRRD_TYPES, fields.get("type", ""), "type")
    shape = _sizes(fields.get("sizes", ""), fields.get("dimension", ""), "sizes")
    big = fields.get("endian", "little").lower() == "big"
    return Declared(shape, dtype.newbyteorder(">" if big else "<"), encoding, start=min(ends))


def _plain_type(table: dict[str, str], name: str, field: str) -> np.dtype:
    if name not in table:
        raise RejectedError(Kind.FORMAT, f"{field} {name!r} is no plain number type", "Save it as int16 or float32")
    return np.dtype(table[name])


def _sizes(text: str, dimensions: str, field: str) -> tuple[int, ...]:
    words = text.split()
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words) or dimensions != str(len(words)):
        reason = (
            f"{field} {text!r} for {dimensions or 'an unknown number of'} dimensions; each must be a number above 0"
        )
        raise RejectedError(Kind.HEADER, reason, _EXPORT)
    return _trimmed(tuple(map(int, words)))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
