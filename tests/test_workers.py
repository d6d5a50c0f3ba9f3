"""nnU-Net's workers start from a fork server that has imported what they need."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
from nnunetv2.inference import data_iterators, predict_from_raw_data

from nnunet_umit import registration, workers

linux = pytest.mark.skipif(sys.platform != "linux", reason="fork servers are used on Linux only")
PROGRAM = """
import multiprocessing, os, sys, types
from multiprocessing import forkserver
from nnunet_umit import workers

def look(_):
    return os.getppid(), "colorsys" in sys.modules, workers.use_fork_server()

if __name__ == "__main__":
    import colorsys
    stock = types.ModuleType("stock")
    stock.multiprocessing = multiprocessing
    sys.modules[workers.STARTING[0]] = stock
    workers.IMPORTED = ("colorsys", "not_imported_here")
    assert workers.use_fork_server() and workers.use_fork_server()
    own = stock.multiprocessing
    assert own is not multiprocessing and own.cpu_count() == multiprocessing.cpu_count()
    assert forkserver._forkserver._forkserver_pid is None, "no worker, no server"
    assert own.get_context("fork").get_start_method() == "fork"
    with own.get_context("spawn").Pool(2) as pool:
        found = set(pool.map(look, range(6)))
    assert found == {(forkserver._forkserver._forkserver_pid, True, False)}, found
    print("as it should be")
"""


@linux
def test_workers_come_from_a_server_that_has_imported_what_the_command_has(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM, encoding="utf-8")
    ended = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() == "as it should be", ended.stderr


@linux
def test_without_a_server_workers_are_spawned_as_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(forkserver, "ensure_running", fail)
    context = workers.ForkingMultiprocessing().get_context("spawn")
    assert context.get_start_method() == "spawn"
    assert "no fork server ([Errno 24] Too many open files)" in capsys.readouterr().err


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("trainer", ["UMITTrainer", "nnUNetTrainer"])
def test_prediction_with_our_networks_uses_it_on_linux(
    monkeypatch: pytest.MonkeyPatch, platform: str, trainer: str
) -> None:
    for module in (predict_from_raw_data, data_iterators):
        monkeypatch.setattr(module, "multiprocessing", multiprocessing)
    monkeypatch.setattr(sys, "platform", platform)
    registration._find_for_prediction(lambda name: name, trainer)
    forking = [
        isinstance(module.multiprocessing, workers.ForkingMultiprocessing)
        for module in (predict_from_raw_data, data_iterators)
    ]
    assert forking == [trainer == "UMITTrainer" and platform == "linux"] * 2
