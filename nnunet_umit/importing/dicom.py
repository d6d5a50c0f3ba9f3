"""DICOM files of one folder, sorted into series by GDCM. Judged and converted later, a series at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import blake2b

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
        state = blake2b(repr([(name, states[name]) for name in names]).encode(), digest_size=16).hexdigest()
        name = case_name(folder.relative, extra=uid)
        relative = f"{folder.relative}/{uid}"
        series.append(Candidate(path=folder.path, relative=relative, case=name, state=state, files=names))
    rejections = tuple(
        Rejection(path=os.path.join(folder.path, name), kind=Kind.HEADER, reason=reason, fix="Export it again")
        for name in sorted(left)
    )
    return Survey(tuple(series), rejections)
