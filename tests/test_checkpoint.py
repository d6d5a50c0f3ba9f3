"""Checkpoints: plain content, whole at every moment, clear errors."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_umit import files
from nnunet_umit.trainers import checkpoint
from nnunet_umit.trainers.checkpoint import (
    FORMAT,
    LATEST,
    PREVIOUS,
    CheckpointError,
    atomic_save,
    differences,
    read_checkpoint,
    read_with_fallback,
    state_mismatch,
    tensor_bytes,
    to_plain,
)


def content(epoch: int = 1, **extra: object) -> dict:
    return {
        "network_weights": {"weight": torch.full((4,), float(epoch))},
        "optimizer_state": {},
        "logging": {"train_losses": [np.float64(0.5)]},
        "current_epoch": epoch,
        "init_args": {"configuration": "2d", "device": torch.device("cpu")},
        "trainer_name": "UMITTrainer",
        "umit": {"format": FORMAT},
        **extra,
    }


def test_a_file_that_windows_keeps_open_is_replaced_a_moment_later(tmp_path: Path, monkeypatch: Any) -> None:
    part, path = tmp_path / "part", tmp_path / "path"
    path.write_text("old")
    waited, rename = [], os.replace

    def refuse(source: object, target: object) -> None:
        if len(waited) < 3:
            raise PermissionError(13, "in use")
        rename(source, target)

    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt", replace=refuse))
    monkeypatch.setattr(files, "time", SimpleNamespace(sleep=waited.append))
    part.write_text("new")
    files.replace(part, path)
    assert path.read_text() == "new" and waited == list(files.DELAYS[:3])
    monkeypatch.setattr(files, "os", SimpleNamespace(name="posix", replace=refuse))
    waited.clear()
    with pytest.raises(PermissionError):
        files.replace(part, path)
    assert waited == []


def test_numpy_values_are_stored_as_plain_ones(tmp_path: Path) -> None:
    """One numpy.float64 is enough to make a file unreadable with weights_only=True."""
    torch.save({"score": np.float64(1)}, tmp_path / "numpy.pth")
    with pytest.raises(Exception, match="[Ww]eights"):
        torch.load(tmp_path / "numpy.pth", weights_only=True)
    stored = {
        "score": np.float64(0.25),
        "count": np.int16(3),
        "yes": np.bool_(True),
        "array": np.arange(3),
        "axes": (0, 1),
        "none": None,
        "version": torch.__version__,
        "path": Path("a"),
        "nested": [{"deep": np.float32(2)}],
        "device": torch.device("cpu"),
    }
    atomic_save(stored, tmp_path / "plain.pth")
    loaded = torch.load(tmp_path / "plain.pth", weights_only=True)
    assert loaded == {
        "score": 0.25, "count": 3, "yes": True, "array": [0, 1, 2], "axes": (0, 1), "none": None,
        "version": str(torch.__version__), "path": "a", "nested": [{"deep": 2.0}], "device": "cpu",
    }  # fmt: skip
    assert all(
        type(loaded[name]) in (float, int, bool, list, str) for name in ("score", "count", "yes", "array", "path")
    )


def test_objects_without_a_plain_form_are_refused() -> None:
    with pytest.raises(TypeError, match="SimpleNamespace"):
        to_plain({"network": SimpleNamespace()})


def test_views_do_not_drag_their_storage_along(tmp_path: Path) -> None:
    atomic_save({"view": torch.zeros(1_000_000)[:2]}, tmp_path / "view.pth")
    assert (tmp_path / "view.pth").stat().st_size < 10_000
    assert tensor_bytes({"a": [torch.zeros(3)], "b": 1}) == 12


def test_saving_keeps_the_previous_file_and_leaves_no_rubbish(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        atomic_save(content(epoch), tmp_path / LATEST, previous=tmp_path / PREVIOUS)
    assert read_checkpoint(tmp_path / LATEST)["current_epoch"] == 3
    assert read_checkpoint(tmp_path / PREVIOUS)["current_epoch"] == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == [LATEST, PREVIOUS]


def test_previous_is_kept_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in (1, 2):
        atomic_save(content(epoch), tmp_path / LATEST, previous=tmp_path / PREVIOUS)
    assert read_checkpoint(tmp_path / PREVIOUS)["current_epoch"] == 1


def test_full_disk_is_announced_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_save(content(1), tmp_path / LATEST)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.004 GB but only 0\.000 GB are free.*intact"):
        atomic_save(content(2), tmp_path / LATEST)
    assert read_checkpoint(tmp_path / LATEST)["current_epoch"] == 1


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("requested and 0 written")])
def test_failure_while_writing_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    atomic_save(content(1), tmp_path / LATEST, previous=tmp_path / PREVIOUS)

    def fail(stored: object, file: object) -> None:
        file.write(b"half a checkpoint")  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match="intact"):
        atomic_save(content(2), tmp_path / LATEST, previous=tmp_path / PREVIOUS)
    assert read_checkpoint(tmp_path / LATEST)["current_epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == [LATEST]


KILLED = """
    import os, sys, torch
    from pathlib import Path
    from nnunet_umit.trainers.checkpoint import atomic_save
    folder, stage = Path(sys.argv[1]), sys.argv[2]
    def die(*arguments, **keywords):
        os.kill(os.getpid(), 9)
    def half(stored, file):
        file.write(b"PK half a checkpoint"); file.flush(); die()
    if stage == "write": torch.save = half
    elif stage == "sync": os.fsync = die
    elif stage == "link": os.link = die
    elif stage == "first rename": os.replace = die
    elif stage == "second rename":
        rename = os.replace
        os.replace = lambda a, b: die() if str(b).endswith("latest.pth") else rename(a, b)
    elif stage == "folder": os.open = die
    state = {"network_weights": {}, "optimizer_state": {}, "logging": {}, "current_epoch": 2, "init_args": {},
             "trainer_name": "UMITTrainer", "umit": {"format": 1}}
    atomic_save(state, folder / "checkpoint_latest.pth", previous=folder / "checkpoint_previous.pth")
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("stage", ["write", "sync", "link", "first rename", "second rename", "folder"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, stage: str) -> None:
    atomic_save(content(1), tmp_path / LATEST)
    code = textwrap.dedent(KILLED)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), stage], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    expected = 2 if stage == "folder" else 1
    assert read_checkpoint(tmp_path / LATEST)["current_epoch"] == expected
    atomic_save(content(3), tmp_path / LATEST, previous=tmp_path / PREVIOUS)  # leftovers are no obstacle
    assert read_checkpoint(tmp_path / LATEST)["current_epoch"] == 3
    assert read_checkpoint(tmp_path / PREVIOUS)["current_epoch"] == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == [LATEST, PREVIOUS]


def test_damaged_latest_falls_back_loudly(tmp_path: Path) -> None:
    for epoch in (1, 2):
        atomic_save(content(epoch), tmp_path / LATEST, previous=tmp_path / PREVIOUS)
    damage(tmp_path / LATEST)
    lines: list[str] = []
    assert read_with_fallback(tmp_path / LATEST, lines.append)["current_epoch"] == 1
    assert len(lines) == 1 and "damaged" in lines[0] and PREVIOUS in lines[0]
    damage(tmp_path / PREVIOUS)
    with pytest.raises(CheckpointError, match="fallback failed"):
        read_with_fallback(tmp_path / LATEST, lines.append)


def test_damaged_final_does_not_fall_back(tmp_path: Path) -> None:
    atomic_save(content(1), tmp_path / PREVIOUS)
    (tmp_path / "checkpoint_final.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        read_with_fallback(tmp_path / "checkpoint_final.pth")


def test_damage_inside_a_complete_archive_is_found(tmp_path: Path) -> None:
    file = tmp_path / LATEST
    atomic_save(content(1), file)
    data = bytearray(file.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged|not written by"):
        read_checkpoint(file)


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nnUNetv2_train"):
        read_checkpoint(tmp_path / LATEST)
    torch.save({"network_weights": {}, "logging": np.float64(1)}, tmp_path / "stock.pth")
    with pytest.raises(CheckpointError, match="not written by a UMIT trainer"):
        read_checkpoint(tmp_path / "stock.pth")
    stock = content()
    del stock["umit"]
    atomic_save(stock, tmp_path / "plain_stock.pth")
    with pytest.raises(CheckpointError, match="it has no umit"):
        read_checkpoint(tmp_path / "plain_stock.pth")
    atomic_save(content(umit={"format": 99}), tmp_path / "future.pth")
    with pytest.raises(CheckpointError, match="format 99"):
        read_checkpoint(tmp_path / "future.pth")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(marker),)

    torch.save({"network_weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "evil.pth")
    assert not marker.exists()


def test_differences_are_readable() -> None:
    old = {"epochs": 10, "same": [1, 2], "deep": {"width": 192}, "gone": 1}
    new = {"epochs": 20, "same": (1, 2), "deep": {"width": 256}}
    assert differences(old, new) == [
        "deep.width: 192 in the checkpoint, 256 now",
        "epochs: 10 in the checkpoint, 20 now",
        "gone: 1 in the checkpoint, '(absent)' now",
    ]


def test_state_mismatch_names_every_kind_and_stops_early() -> None:
    stored = {"a": torch.zeros(2), "b": torch.zeros(3), "extra": torch.zeros(1)}
    present = {"a": torch.zeros(2), "b": torch.zeros(4), "lost": torch.zeros(1)}
    assert state_mismatch(stored, present) == [
        "missing in the checkpoint: lost",
        "not in the network: extra",
        "b: shape (3,) in the checkpoint, (4,) in the network",
    ]
    assert state_mismatch({}, {str(key): torch.zeros(1) for key in range(9)}, limit=2)[-1] == "... and 7 more"
