"""Fixtures that every room's tests share."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import synthetic

sys.path.append(str(Path(__file__).parents[1]))  # for `benchmarks`; last, so that the installed package is tested

SMALL_MACHINE = {  # nnU-Net with as few processes and threads as it accepts
    "nnUNet_def_n_proc": "1",
    "nnUNet_n_proc_DA": "0",
    "OMP_NUM_THREADS": "2",
    "nnUNet_compile": "f",
    "MPLBACKEND": "Agg",
}


@dataclass(frozen=True)
class Folders:
    """nnU-Net's three folders, empty, set in ``os.environ`` for this test and its sub-processes."""

    raw: Path
    preprocessed: Path
    results: Path


@pytest.fixture
def nnunet_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """Fresh nnU-Net folders below ``tmp_path`` and settings for a small machine."""
    folders = Folders(*(tmp_path / f"nnUNet_{part}" for part in ("raw", "preprocessed", "results")))
    for folder in (folders.raw, folders.preprocessed, folders.results):
        folder.mkdir()
        monkeypatch.setenv(folder.name, str(folder))
    for name, value in SMALL_MACHINE.items():
        monkeypatch.setenv(name, value)
    return folders


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``synthetic.make_dataset`` in the session's folder; the same arguments give the same data set, so read only."""
    made: dict[str, Path] = {}

    def make(**options: object) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = synthetic.make_dataset(tmp_path_factory.mktemp("raw"), **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real nnU-Net raw data sets: ``$UMIT_DATA``, or ``shared/data`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("UMIT_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder; set UMIT_DATA to a folder of nnU-Net raw data sets")
    return folder
