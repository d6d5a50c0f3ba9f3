"""nnU-Net's workers: they find UMIT names, and start from a fork server that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import nnunetv2.inference
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


def run_program(folder: Path, text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program that starts workers, which need a file to import it from."""
    (folder / "program.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "program.py", *arguments]
    settings = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, encoding="utf-8", timeout=300)


@linux
def test_workers_come_from_a_server_that_has_imported_what_the_command_has(tmp_path: Path) -> None:
    ended = run_program(tmp_path, PROGRAM)
    assert ended.stdout.strip() == "as it should be", ended.stderr


@linux
def test_the_server_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    """``colorsys`` stands for any module that torch or nnU-Net import."""
    (tmp_path / "program").mkdir()
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('not the one of the standard library')\n")
    (tmp_path / "program" / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "program" / "program.py")]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300)
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


EARLY = """
import sys
from nnunet_umit import workers

sys.argv = {command}
workers.start_server = lambda imports: True
with open("served", "a", encoding="utf-8") as file:
    print(workers.start_for_prediction(sys.argv), file=file)

def work(number):
    return number
"""
STARTED = """
import multiprocessing, sys

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    import early

    multiprocessing.set_forkserver_preload(["early"])
    with context.Pool(1) as pool:
        assert pool.map(early.work, [7]) == [7]
"""
PREDICT = ["/bin/nnUNetv2_predict", "-d", "4", "-tr", "UMITTrainer"]
FOLDER = ["/bin/nnUNetv2_predict_from_modelfolder", "-m", "/results/UMITTrainer__UMITPlans__2d"]


@linux
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (PREDICT, True),
        (FOLDER, True),
        ([*PREDICT, "-npp", "2"], True),
        ([*PREDICT, "-npp", "0", "-nps", "0"], False),  # no workers
        (["/bin/nnUNetv2_predict", "-d", "4", "-tr", "nnUNetTrainer"], False),
        (["/bin/nnUNetv2_train", "4", "2d", "0", "-tr", "UMITTrainer"], False),  # imports the predictor as well
    ],
)
def test_the_server_starts_before_a_prediction_with_our_networks_only(
    monkeypatch: pytest.MonkeyPatch, command: list[str], expected: bool
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(workers, "start_server", lambda imports: not started.append(imports))
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.delitem(sys.modules, registration.PREDICTOR)
    found = registration._Finder("test").find_spec(registration.PREDICTOR, list(nnunetv2.inference.__path__))
    assert found is not None and bool(started) is expected
    if expected:
        assert set(started[0]) <= set(workers.IMPORTED), "what the server of a late start imports, too"


@linux
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_neither_a_server_nor_a_worker_starts_a_server(tmp_path: Path, method: str) -> None:
    # its sys.argv is that of the command (Python hands it on from 3.13.12 and 3.14.3 on), as it imports the predictor
    (tmp_path / "early.py").write_text(EARLY.format(command=PREDICT), encoding="utf-8")
    ended = run_program(tmp_path, STARTED, method)
    assert ended.returncode == 0, ended.stderr
    served = (tmp_path / "served").read_text(encoding="utf-8").split()
    assert served == ["True", "False"], "the command itself may, what it started may not"


def test_a_server_that_cannot_start_stops_no_prediction(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(command: list[str]) -> bool:
        raise ValueError("no luck")

    monkeypatch.setattr(workers, "start_for_prediction", fail)
    monkeypatch.setattr(sys, "argv", PREDICT)
    registration._prepare_prediction()
    assert "starting the workers' server early failed (ValueError: no luck)" in capsys.readouterr().err


# --- what they find --------------------------------------------------------------------------------------------------

WORKER = """
import multiprocessing
def look(name):
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
    found = find("/no/such/folder", name, "nnunetv2.training.nnUNetTrainer")
    return found.__module__
if __name__ == "__main__":
    import sys
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.apply(look, ("UMITProbe",)))
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
@pytest.mark.parametrize("hook", ["start-up", "by call"])
def test_worker_processes_find_the_names(tmp_path: Path, method: str, hook: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    table = "from nnunet_umit import registration\n"
    table += 'registration.REGISTRY["nnunetv2.training.nnUNetTrainer", "UMITProbe"] = "probe_module"\n'
    table += "registration.register()\n" if hook == "by call" else ""
    (tmp_path / "probe_module.py").write_text("class UMITProbe: pass\n")
    environment = {"PYTHONPATH": str(tmp_path), registration.NO_HOOK: "1" if hook == "by call" else "0"}
    done = run_program(tmp_path, table + WORKER, method, **environment)
    assert done.stdout.strip() == "probe_module", done.stderr


PREPARING = """
import multiprocessing
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

if __name__ == "__main__":
    import nnunet_umit
    nnunet_umit.register()  # in this process only: a spawned one does not run this line
    from nnunetv2.inference import data_iterators
    configuration = {"preprocessor_name": "UMITPreprocessor", "architecture": {}}
    plans = PlansManager({"label_manager": "LabelManager", "configurations": {"2d": configuration}})
    labels = {"labels": {"background": 0, "ball": 1}}
    context = multiprocessing.get_context("spawn")
    for name in ("preprocess_fromfiles_save_to_queue", "preprocess_fromnpy_save_to_queue"):
        done, aborted = context.Event(), context.Event()
        none = [[]] * (3 if "files" in name else 4)
        arguments = (*none, plans, labels, plans.get_configuration("2d"), context.Queue(), done, aborted)
        worker = context.Process(target=getattr(data_iterators, name), args=arguments)
        worker.start()
        worker.join()
        print(done.is_set(), aborted.is_set())
"""


def test_workers_of_a_prediction_find_the_preprocessor_where_only_their_parent_registered(tmp_path: Path) -> None:
    done = run_program(tmp_path, PREPARING, **{registration.NO_HOOK: "1"})
    assert done.stdout.split() == ["True", "False"] * 2, done.stderr
