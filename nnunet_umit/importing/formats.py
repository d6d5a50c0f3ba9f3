"""Which format a file is in: what its suffix promises, and what its first bytes say."""

from __future__ import annotations

import zlib
from typing import Literal

from nnunet_umit.plans import nifti

Format = Literal["nifti", "nifti.gz", "mha", "nrrd", "png", "tiff", "dicom"]

HEAD = 1024  # bytes that are enough to name a format
SUFFIXES: dict[str, Format] = {  # .nii.gz stands before .nii, so that it is tried first
    ".nii.gz": "nifti.gz",
    ".nii": "nifti",
    ".mha": "mha",
    ".nrrd": "nrrd",
    ".png": "png",
    ".tiff": "tiff",
    ".tif": "tiff",
    ".dicom": "dicom",
    ".dcm": "dicom",
    ".ima": "dicom",
}
PAIRED = (".hdr", ".mhd", ".nhdr")  # headers whose voxels are in a second file
PICTURES = ("png", "tiff")
FOREIGN = {  # first bytes of pictures that are images, but none that is imported
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}
FOREIGN_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp", ".jp2", ".j2k", ".jpx")


def suffix_of(name: str) -> tuple[str, Format] | None:
    """The known suffix that a file name ends with, and the format it promises."""
    lower = name.lower()
    return next(((suffix, kind) for suffix, kind in SUFFIXES.items() if lower.endswith(suffix)), None)


def suffix_for(kind: str) -> str:
    """The usual suffix of a format."""
    return next(suffix for suffix, known in SUFFIXES.items() if known == kind and suffix not in (".tiff", ".dicom"))


def foreign(head: bytes, suffix: str) -> str | None:
    """The name of a kind of picture that is not imported, where both suffix and first bytes say that it is one."""
    if suffix.lower() not in FOREIGN_SUFFIXES:
        return None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    return next((name for start, name in FOREIGN.items() if head.startswith(start)), None)


def sniff(head: bytes) -> str | None:
    """The format that the first `HEAD` bytes of a file belong to, ``"gzip"`` when only that is certain, or None."""
    if head[:2] == b"\x1f\x8b":
        try:
            inside = zlib.decompressobj(wbits=31).decompress(head, 600)
        except zlib.error:
            return "gzip"
        return "nifti.gz" if nifti.Header.parse(inside) is not None else "gzip"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"NRRD000"):
        return "nrrd"
    if head[128:132] == b"DICM":
        return "dicom"
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "nifti"
    return "mha" if head.lstrip().startswith((b"ObjectType", b"NDims")) else None
