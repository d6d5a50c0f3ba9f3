"""Fixtures that every room's tests share."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import synthetic
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two test processes share the cores
sys.path.append(str(Path(__file__).parents[1]))  # for `benchmarks`; last, so that the installed package is tested

# The same examples in every run, and no clock: a suite must not pass or fail by luck or on a busy machine.
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")

SMALL_MACHINE = {  # nnU-Net with as few processes and threads as it accepts
    "nnUNet_def_n_proc": "1",
    "nnUNet_n_proc_DA": "0",
    "OMP_NUM_THREADS": "1",
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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny networks are slower on many threads, much slower on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def prepare(nnunet_env: Folders) -> Callable[..., dict[str, Any]]:
    """Write a preprocessed dataset for ``tiny_training.make_plans(**options)`` and return the plans."""
    import tiny_training as tiny

    def prepare(cases: int = 4, ignore: int | None = None, **options: Any) -> dict[str, Any]:
        plans = tiny.make_plans(**options)
        tiny.write_preprocessed(nnunet_env.preprocessed, plans, cases=cases, ignore=ignore)
        return plans

    return prepare


@pytest.fixture
def native(nnunet_env: Folders) -> Callable[..., dict[str, Any]]:
    """Plans of ``3d_native``, and preprocessed cases of the given spacings."""
    import tiny_training as tiny

    def native(cases: int = 4, spacings: Any = tiny.NATIVE_SPACINGS, **options: Any) -> dict[str, Any]:
        plans = tiny.make_plans(native=True, **options)
        tiny.write_preprocessed(nnunet_env.preprocessed, plans, cases=cases, spacings=spacings)
        return plans

    return native


@pytest.fixture
def pretrained(prepare: Callable[..., dict[str, Any]]) -> tuple[dict[str, Any], Path]:
    """Plans, and a checkpoint of a pre-training that has just begun."""
    import tiny_training as tiny

    from nnunet_umit.trainers import checkpoint as checkpoints
    from nnunet_umit.trainers.pretrain import UMITPretrainTrainer

    plans = prepare()
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    tiny.kill_at(trainer, 0)
    with pytest.raises(tiny.Killed):
        trainer.run_training()
    return plans, tiny.folder_of(trainer) / checkpoints.LATEST
