"""Which cases a benchmark trains on and predicts: from the grouped splits, by rules that need no luck."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

Split = dict[str, list[str]]


def read_fold(data: Path, dataset: str, fold: int) -> Split:
    """Training and validation cases of one fold of ``data/splits/<dataset>.json``.

    Raises:
        ValueError: the file has fewer folds.
    """
    file = data / "splits" / f"{dataset}.json"
    folds = json.loads(file.read_text(encoding="utf-8"))
    if not 0 <= fold < len(folds):
        raise ValueError(f"fold {fold} of {dataset}: splits/{file.name} has folds 0 to {len(folds) - 1}")
    return {name: list(folds[fold][name]) for name in ("train", "val")}


def few_cases(split: Mapping[str, Sequence[str]], training: int, validation: int | None) -> Split:
    """The first training cases as the file has them, and the first validation cases in alphabetical order
    (None: all).

    The file keeps scans that belong together next to each other, so the first ten cases are few subjects, whole.

    Raises:
        ValueError: there are fewer training cases.
    """
    if len(split["train"]) < training:
        raise ValueError(f"{training} labelled cases were asked for, but the fold trains on {len(split['train'])}")
    return {"train": list(split["train"][:training]), "val": sorted(split["val"])[:validation]}


def image_files(dataset: Path, case: str) -> list[Path]:
    """The raw images of a case, one for each channel (``case_0000.nii.gz``).

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted((dataset / "imagesTr").glob(f"{case}_[0-9][0-9][0-9][0-9].*"))
    if not files:
        raise FileNotFoundError(f"no image of case {case} in {dataset.name}/imagesTr, which the split names")
    return files


def link_images(dataset: Path, cases: Sequence[str], folder: Path) -> int:
    """Link the raw images of some cases into a folder that holds nothing else; returns their number.

    Raises:
        FileExistsError: the folder holds other files.
    """
    files = [file for case in cases for file in image_files(dataset, case)]
    folder.mkdir(parents=True, exist_ok=True)
    strangers = sorted({each.name for each in folder.iterdir()} - {file.name for file in files})
    if strangers:
        raise FileExistsError(f"{folder} holds other files than the {len(files)} to predict ({strangers[0]}); empty it")
    for file in files:
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    return len(files)
