"""DICOM files sorted into series by what their headers say. Judged and converted later, a series at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import SimpleITK as sitk

from nnunet_umit.importing.discover import case_name
from nnunet_umit.importing.verdict import Candidate, Kind, Rejection

SERIES, NUMBER, POSITION, DIRECTIONS = "0020|000e", "0020|0013", "0020|0032", "0020|0037"

SAME_WAY = 0.01  # of direction cosines


@dataclass(frozen=True)
class Folder:
    """A folder with DICOM files: absolute and relative path, and (name, state) of each file."""

    path: str
    relative: str
    files: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Survey:
    """Series of one folder, and its files that belong to none."""

    series: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]


@dataclass(frozen=True)
class Slice:
    """What the header of one file says.

    Args:
        uid: Series Instance UID.
        number: Instance Number, infinite where there is none.
        directions: Image Orientation (Patient): of rows, then of columns; None where there is none.
        position: Image Position (Patient), mm; None where there is none.
    """

    uid: str
    number: float
    directions: tuple[float, ...] | None
    position: tuple[float, ...] | None


def survey(folder: Folder) -> Survey:
    """Read the header of every file of a folder once, and sort the files into series."""
    states, found = dict(folder.files), dict[str, dict[str, Slice]]()
    rejections = []
    for name in sorted(states):
        read = read_slice(os.path.join(folder.path, name))
        if read is None:
            reason = "belongs to no DICOM series that GDCM can read: damaged, truncated, or no image"
            path = os.path.join(folder.path, name)
            rejections.append(Rejection(path=path, kind=Kind.HEADER, reason=reason, fix="Export it again"))
        else:
            found.setdefault(read.uid, {})[name] = read
    series = []
    for uid, slices in found.items():
        names = in_order(slices)
        series.append(
            Candidate(
                path=folder.path,
                relative=f"{folder.relative}/{uid}",
                case=case_name(folder.relative, extra=uid),
                state=_digest([(name, states[name]) for name in names]),
                files=names,
            )
        )
    return Survey(tuple(series), tuple(rejections))


def read_slice(path: str) -> Slice | None:
    """The header of a file; None where SimpleITK finds no image in it, or no series."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
        uid, number, directions, position = (
            reader.GetMetaData(tag) if reader.HasMetaDataKey(tag) else ""
            for tag in (SERIES, NUMBER, DIRECTIONS, POSITION)
        )
    except Exception:  # SimpleITK's boundary: the caller says what it means that a file cannot be read
        return None
    if not uid.strip("\0 "):
        return None
    return Slice(uid.strip("\0 "), (numbers(number, 1) or (math.inf,))[0], numbers(directions, 6), numbers(position, 3))


def numbers(text: str, count: int) -> tuple[float, ...] | None:
    """The numbers of a DICOM value, ``"1\\2\\3"``; None where it does not hold ``count`` of them."""
    try:
        found = tuple(float(word) for word in (each.strip("\0 ") for each in text.split("\\")) if word)
    except ValueError:
        return None
    return found if len(found) == count else None


def in_order(slices: dict[str, Slice]) -> tuple[str, ...]:
    """Names along the normal of the slices; by their numbers where places do not tell (and a judge will say why)."""
    places = _along(slices.values())
    if places is not None and len(set(places)) == len(slices):
        return tuple(name for _, name in sorted(zip(places, slices, strict=True)))
    return tuple(sorted(slices, key=lambda name: (slices[name].number, name)))


def _along(slices: Iterable[Slice]) -> list[float] | None:
    """Places in mm along the common normal, to a thousandth; None where one has no place or looks another way."""
    normal, places = None, []
    for each in slices:
        if each.directions is None or each.position is None:
            return None
        own = np.cross(each.directions[:3], each.directions[3:])
        if normal is None:
            normal, common = own, each.directions
        if not np.allclose(each.directions, common, atol=SAME_WAY):
            return None
        places.append(round(float(normal @ np.asarray(each.position)), 3))
    return places


def join(series: Iterable[Candidate]) -> list[Candidate]:
    """Make one candidate of a series that lies in several folders, as on CDs (some files each) and in archives (one).

    Folders hold parts of one series where its UID is the same in all of them, its slices look the same way, and no two
    of them have the same place. Otherwise they stay apart: copies, of which one is kept later, or several series that
    an anonymiser gave one UID.
    """
    parts: dict[str, list[Candidate]] = {}
    for each in series:
        parts.setdefault(each.uid, []).append(each)
    joined: list[Candidate] = []
    for found in parts.values():
        whole = _whole(found) if len(found) > 1 else None
        joined += found if whole is None else [whole]
    return joined


def _whole(parts: Sequence[Candidate]) -> Candidate | None:
    """The parts as one candidate under the name of the first; None where they do not belong together."""
    slices = {
        path: read_slice(path) for part in parts for path in (os.path.join(part.path, name) for name in part.files)
    }
    known = {path: each for path, each in slices.items() if each is not None}
    places = _along(known.values())
    if places is None or len(known) < len(slices) or len(set(places)) < len(slices):
        return None
    root = os.path.commonpath([part.path for part in parts])
    files = tuple(os.path.relpath(path, root) for path in in_order(known))
    first = min(parts, key=lambda part: part.relative)
    state = _digest(sorted((part.relative, part.state) for part in parts))
    return replace(first, path=root, files=files, state=state)


def _digest(states: Sequence[tuple[str, str]]) -> str:
    return blake2b(repr(list(states)).encode(), digest_size=16).hexdigest()
