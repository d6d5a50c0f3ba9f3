"""DICOM files of one folder, sorted into series by GDCM. Judged and converted later, a series at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import SimpleITK as sitk

from nnunet_umit.importing.discover import case_name
from nnunet_umit.importing.verdict import Candidate, Kind, Rejection


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


def survey(folder: Folder) -> Survey:
    """Read the headers of all files of a folder. Damaged files, which GDCM passes over without a word, are named."""
    states = dict(folder.files)
    series, left = [], set(states)
    reason = "belongs to no DICOM series that GDCM can read: damaged, truncated, or no image"
    try:
        found = {
            uid: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder.path, uid)
            for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(folder.path)
        }
    except Exception as error:  # SimpleITK's boundary: every file of the folder is named with its words
        found, reason = {}, f"GDCM cannot read its folder ({error})"
    for uid, paths in found.items():
        names = tuple(name for name in map(os.path.basename, paths) if name in left)
        if not names:
            continue
        left.difference_update(names)
        state = _digest([(name, states[name]) for name in names])
        name = case_name(folder.relative, extra=uid)
        relative = f"{folder.relative}/{uid}"
        series.append(Candidate(path=folder.path, relative=relative, case=name, state=state, files=names))
    rejections = tuple(
        Rejection(path=os.path.join(folder.path, name), kind=Kind.HEADER, reason=reason, fix="Export it again")
        for name in sorted(left)
    )
    return Survey(tuple(series), rejections)


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
    paths = [os.path.join(part.path, name) for part in parts for name in part.files]
    places = [_place(path) for path in paths]
    known = [place for place in places if place is not None]
    if len(set(known)) < len(paths) or len({directions for directions, _ in known}) > 1:
        return None
    directions = np.array(known[0][0])
    along = [float(np.cross(directions[:3], directions[3:]) @ position) for _, position in known]
    root = os.path.commonpath([part.path for part in parts])
    files = tuple(os.path.relpath(path, root) for _, path in sorted(zip(along, paths, strict=True)))
    first = min(parts, key=lambda part: part.relative)
    state = _digest(sorted((part.relative, part.state) for part in parts))
    return replace(first, path=root, files=files, state=state)


def _place(path: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Directions of rows and columns, and position in mm, of a slice; None where its header has none."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
        words = [reader.GetMetaData(tag).split("\\") for tag in ("0020|0037", "0020|0032")]
        directions, position = ([float(word) for word in each] for each in words)
    except Exception:  # SimpleITK's boundary: its series is judged as it lies, and what is wrong is said then
        return None
    if (len(directions), len(position)) != (6, 3):
        return None
    return tuple(round(value, 4) for value in directions), tuple(round(value, 3) for value in position)


def _digest(states: Sequence[tuple[str, str]]) -> str:
    return blake2b(repr(list(states)).encode(), digest_size=16).hexdigest()
