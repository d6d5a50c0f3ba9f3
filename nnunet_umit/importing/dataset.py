"""The dataset folder: built beside its place under a hidden name, and moved there when it is whole."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnunet_umit import __version__
from nnunet_umit.importing.judge import IMAGES, LABELS, label_suffix
from nnunet_umit.importing.verdict import Case, Kind, Rejection

QUARANTINE = "quarantine.csv"
JOURNAL = "journal.jsonl"
MARK = "umit_import"  # key in dataset.json: this folder was written by an import and may be replaced by one
_COLOURS = ("R", "G", "B", "A")


class RequestError(ValueError):
    """The request cannot be carried out; the message names the value, the limit and the fix."""


def folder_name(number: int, name: str) -> str:
    """``Dataset901_Scans``.

    Raises:
        RequestError: For a number or name that nnU-Net would not find again.
    """
    if not 1 <= number <= 999:
        raise RequestError(f"dataset number {number} must lie between 1 and 999")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise RequestError(f"dataset name {name!r} may hold letters, digits, _ and - only; choose another --name")
    return f"Dataset{number:03d}_{name}"


def check_place(raw: Path, folder: str, overwrite: bool) -> None:
    """Refuse a place that is taken.

    Raises:
        RequestError: When the folder exists (with `overwrite`: and is not an import's), or the number has another name.
    """
    if not raw.is_dir():
        raise RequestError(f"{raw} is not a folder; create it, or give another with --raw")
    number = folder.split("_")[0]
    elsewhere = [os.environ.get(name) for name in ("nnUNet_preprocessed", "nnUNet_results")]
    places = [raw, *(Path(place) for place in elsewhere if place and Path(place).is_dir())]
    for place in places:
        others = [path for path in place.glob(f"{number}_*") if path.is_dir() and path.name != folder]
        if others:
            raise RequestError(f"number {number[7:]} belongs to {others[0]} already; choose another --dataset")
    target = raw / folder
    if not target.exists():
        return
    if not overwrite:
        raise RequestError(f"{target} exists; choose another --dataset and --name, or replace it with --overwrite")
    if not is_import(target):
        raise RequestError(
            f"{target} was not written by umit import and will not be replaced; choose another --dataset"
        )


def is_import(folder: Path) -> bool:
    """Whether a dataset folder was written here."""
    try:
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and MARK in content


def staging_folder(raw: Path, folder: str) -> Path:
    """Where the dataset is built: on the same file system, under a name that nnU-Net does not look at."""
    return raw / f".umit-import-{folder}"


def describe(cases: list[Case], modality: str, source: str, quarantined: int) -> dict[str, Any]:
    """The content of dataset.json. Images stay where they are, by absolute path."""
    reader, channels = cases[0].reader, cases[0].channels
    names = [modality] if channels == 1 else list(_COLOURS[:channels])
    return {
        "channel_names": {str(index): name for index, name in enumerate(names)},
        "labels": {"background": 0, "body": 1},
        "numTraining": len(cases),
        "file_ending": label_suffix(reader),
        "overwrite_image_reader_writer": reader,
        "description": "Images without labels; the label is a body mask made by umit import, for pre-training only.",
        MARK: {"version": __version__, "folder": source, "quarantined": quarantined},
        "dataset": {case.name: {"images": [case.image], "label": case.label} for case in cases},
    }


def write_quarantine(path: Path, rejections: Iterable[Rejection]) -> None:
    """One line a rejection: path, kind, reason, fix. File names that are no UTF-8 keep their bytes."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as handle:
        writer = csv.writer(handle)
        writer.writerow(["path", "kind", "reason", "fix"])
        writer.writerows([entry.path, entry.kind.value, entry.reason, entry.fix] for entry in rejections)


def prune(staging: Path, cases: Iterable[Case]) -> None:
    """Remove masks and converted images of what is not in the dataset after all (duplicates, minorities)."""
    wanted = {part for case in cases for part in (case.label, case.image)}
    for part in (LABELS, IMAGES):
        for file in (staging / part).iterdir():
            if f"{part}/{file.name}" not in wanted:
                file.unlink()
    if not any((staging / IMAGES).iterdir()):
        (staging / IMAGES).rmdir()


def publish(staging: Path, target: Path) -> None:
    """Move the finished dataset to its place; an older import there is replaced, and gone only afterwards.

    The verdicts go last: until the dataset is in its place the same request goes on from them.
    """
    old = staging.with_name(staging.name + "-replaced")
    _remove(old)
    if target.exists():
        os.rename(target, old)
    os.rename(staging, target)
    (target / JOURNAL).unlink(missing_ok=True)
    _remove(old)


def _remove(folder: Path) -> None:
    """Remove a dataset; of a link to one only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def count(rejections: Iterable[Rejection]) -> dict[Kind, int]:
    """Rejections of each kind, most frequent first."""
    counts: dict[Kind, int] = {}
    for entry in rejections:
        counts[entry.kind] = counts.get(entry.kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
