"""The ``umit`` command: light, lazy, and right about what is wrong."""

import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from conftest import Folders
from typer.testing import CliRunner

from nnunet_umit import __version__, registration
from nnunet_umit.cli import checks, doctor, run
from nnunet_umit.cli.app import SUBCOMMANDS, app
from nnunet_umit.cli.checks import Check, State
from nnunet_umit.plans import integrity

SCRIPTS = Path(sys.executable).parent


def umit(*arguments: str) -> tuple[int, str]:
    """Run ``umit`` in this process, on a terminal wide enough that tables do not fold."""
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, list(arguments))
    return result.exit_code, result.output


def by_subject(rows: list[Check]) -> dict[str, Check]:
    return {row.subject: row for row in rows}


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["doctor", "--help"], ["run", "--help"]])
def test_help_needs_neither_torch_nor_nnunet(arguments: list[str]) -> None:
    code = f"""
import sys
from nnunet_umit.cli.app import app
try:
    app({arguments!r}, prog_name="umit")
finally:
    print("LOADED", [name for name in ("torch", "nnunetv2", "numpy", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"
    assert done.stdout.splitlines()[0] != "LOADED []"


def test_help_lists_the_sub_commands_and_version_is_the_packages() -> None:
    code, output = umit("--help")
    assert code == 0
    for name, (_, summary) in SUBCOMMANDS.items():
        assert name in output and summary in output
    assert umit("--version") == (0, f"nnunet-umit {__version__}\n")
    assert umit("nonsense")[0] == 2


def test_options_reach_the_sub_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def fake_doctor(dataset: str | None = None) -> None:
        """Help of the real one."""
        seen.append(dataset)

    monkeypatch.setattr(doctor, "doctor", fake_doctor)
    assert umit("doctor", "--dataset", "27")[0] == 0
    assert seen == ["27"]
    assert "Help of the real one" in umit("doctor", "--help")[1]
    assert umit("doctor", "--no-such-option")[0] == 2


# --- versions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.8.1", (2, 8, 1)), ("2.7", (2, 7, 0)), ("2.15.0+cu132", (2, 15, 0)), ("2.9.0rc1", (2, 9, 0)), ("x", (0, 0, 0))],
)
def test_version_numbers(text: str, expected: tuple[int, int, int]) -> None:
    assert checks.numbers(text) == expected


@pytest.mark.parametrize(
    ("found", "state", "words"),
    [
        ("2.7.0", State.WRONG, "not supported"),
        ("2.8.1", State.OK, "tested"),
        ("2.9.0", State.NOTE, "newer than tested"),
        ("3.0.0", State.WRONG, "not supported"),
    ],
)
def test_nnunet_version_is_judged(monkeypatch: pytest.MonkeyPatch, found: str, state: State, words: str) -> None:
    monkeypatch.setattr(checks, "version", lambda name: found)
    row = by_subject(checks.check_versions())["nnunetv2"]
    assert row.state is state and words in row.finding and found in row.finding
    assert bool(row.fix) == (state is not State.OK)


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = by_subject(checks.check_versions())["torch"]
    assert row.state is State.OK and not row.fix
    monkeypatch.setattr("torch.__version__", "2.3.1+cpu")
    row = by_subject(checks.check_versions())["torch"]
    assert row.state is State.WRONG and "older than 2.4" in row.finding and row.fix == 'pip install "torch>=2.4"'


def test_missing_nnunet_and_broken_torch_are_findings_not_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(checks, "version", missing)
    monkeypatch.setitem(sys.modules, "torch", None)  # "import torch" raises ImportError
    monkeypatch.setitem(sys.modules, "nnunetv2", None)
    rows = by_subject([*checks.check_versions(), *checks.check_names()])
    for subject in ("nnunetv2", "torch", "names"):
        assert rows[subject].state is State.WRONG and rows[subject].fix


# --- hook ---------------------------------------------------------------------------------------------------------


def test_hook_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registration.NO_HOOK, raising=False)
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    monkeypatch.setattr(registration, "mechanism", lambda: registration.START_UP)
    assert all(row.state is State.OK for row in checks.check_hook())
    monkeypatch.setattr(registration, "mechanism", lambda: registration.BY_CALL)
    row = by_subject(checks.check_hook())["start-up hook"]
    assert row.state is State.WRONG and row.fix
    monkeypatch.setenv(registration.NO_HOOK, "1")
    row = by_subject(checks.check_hook())["start-up hook"]
    assert row.state is State.WRONG and row.fix == f"unset {registration.NO_HOOK}"


def test_ext_trainer_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "gone"))
    row = by_subject(checks.check_hook())["nnUNet_extTrainer"]
    assert row.state is State.NOTE and "gone" in row.finding and checks.shim_line() in row.fix
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(checks.shim_folder())]))
    row = by_subject(checks.check_hook())["nnUNet_extTrainer"]
    assert row.state is State.OK and "UMIT shim" in row.finding
    assert (checks.shim_folder() / "umit_trainers.py").is_file()


# --- folders ------------------------------------------------------------------------------------------------------


def test_folders_set_missing_unset_and_full(nnunet_env: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "LOW_SPACE_GIB", 0.0)
    rows = by_subject(checks.check_folders())
    assert {row.state for row in rows.values()} == {State.OK}
    assert "GiB free" in rows["nnUNet_raw"].finding
    monkeypatch.setattr(checks, "LOW_SPACE_GIB", 1e9)
    rows = by_subject(checks.check_folders())
    assert [rows[name].state for name in checks.FOLDERS] == [State.OK, State.NOTE, State.NOTE]
    monkeypatch.delenv("nnUNet_raw")
    nnunet_env.results.rmdir()
    rows = by_subject(checks.check_folders())
    assert rows["nnUNet_raw"].state is State.WRONG and rows["nnUNet_raw"].fix.startswith("export nnUNet_raw=")
    assert rows["nnUNet_results"].fix == f"mkdir -p {nnunet_env.results}"


def test_lines_to_be_copied_survive_spaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "my project"
    monkeypatch.setenv("nnUNet_raw", str(folder))
    assert by_subject(checks.check_folders())["nnUNet_raw"].fix == f"mkdir -p '{folder}'"
    assert checks.set_line("nnUNet_raw", "/a b") == "export nnUNet_raw='/a b'"
    with monkeypatch.context() as patch:  # pytest itself makes paths
        patch.setattr(checks.os, "name", "nt")
        line = checks.set_line("nnUNet_raw", "C:\\a b")
    assert line == 'set "nnUNet_raw=C:\\a b"'


def test_unwritable_folder(nnunet_env: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", refuse)
    rows = by_subject(checks.check_folders())
    assert rows["nnUNet_raw"].state is State.OK  # nnU-Net only reads there
    assert rows["nnUNet_results"].state is State.WRONG
    assert "Permission denied" in rows["nnUNet_results"].finding and "chmod" in rows["nnUNet_results"].fix


# --- names --------------------------------------------------------------------------------------------------------


def test_names_are_looked_up_as_nnunet_does(monkeypatch: pytest.MonkeyPatch) -> None:
    registration.register()
    module = types.ModuleType("probe_for_doctor")
    module.UMITProbe = type("UMITProbe", (), {"__module__": "probe_for_doctor"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "probe_for_doctor", module)
    table = {
        (registration.TRAINERS, "UMITProbe"): "probe_for_doctor",
        (registration.TRAINERS, "UMITBroken"): "no_such_module_at_all",
    }
    monkeypatch.setattr(registration, "REGISTRY", table)
    rows = by_subject(checks.check_names())
    assert rows["UMITProbe"] == Check(subject="UMITProbe", state=State.OK, finding="probe_for_doctor.UMITProbe")
    assert rows["UMITBroken"].state is State.WRONG and "no_such_module_at_all" in rows["UMITBroken"].finding
    assert rows["-pretrained_weights"].state is State.OK


# --- doctor as a whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [False, True])
def test_exit_code_and_every_fix_uncut(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    state = State.WRONG if wrong else State.NOTE
    path = "/a/[bracketed]/" + "long/" * 60 + "path"
    row = Check(subject="thing", state=state, finding=f"bad [red]{path}", fix=f"mkdir -p {path}")
    for name in ("check_versions", "check_hook", "check_folders", "check_names"):
        monkeypatch.setattr(doctor, name, lambda: [row, row])
    code, output = umit("doctor")
    assert code == (1 if wrong else 0)
    assert output.count("thing, thing: mkdir -p " + path + "\n") == 4  # one fix a table, in one line, to be copied
    assert checks.shim_line() in output


def test_doctor_as_a_command_lists_everything(nnunet_env: Folders) -> None:
    done = subprocess.run(
        [str(SCRIPTS / "umit"), "doctor"],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "250", "nnUNet_raw": ""},
    )
    assert done.returncode == 1  # nnUNet_raw is not set
    assert "export nnUNet_raw=" in done.stdout
    for _, name in registration.REGISTRY:
        assert name in done.stdout
    for subject in ("python", "torch", "nnunetv2", "start-up hook", registration.NO_HOOK, *checks.FOLDERS):
        assert subject in done.stdout


# --- doctor --dataset ---------------------------------------------------------------------------------------------


def test_dataset_by_number_name_and_path(nnunet_env: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = nnunet_env.raw / "Dataset004_Thing"
    folder.mkdir()
    (nnunet_env.raw / "Dataset040_Other").mkdir()
    for name in ("4", "004", "Dataset004_Thing", str(folder)):
        assert doctor.find_dataset(name) == folder
    with pytest.raises(FileNotFoundError, match="no data set 77 in .*there is: Dataset004_Thing, Dataset040_Other"):
        doctor.find_dataset("77")
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(FileNotFoundError, match="nnUNet_raw is not set"):
        doctor.find_dataset("4")


def test_dataset_check_reports_problems_and_exit_code(make_dataset: Callable[..., Path], nnunet_env: Folders) -> None:
    healthy = make_dataset(cases=2)
    code, output = umit("doctor", "--dataset", str(healthy))
    assert code == 0, output
    assert "no problems" in output
    broken = make_dataset(cases=3, corruptions={1: "truncated", 2: "label"})
    code, output = umit("doctor", "-d", str(broken))
    assert code == 1
    assert "case_001_0000.nii.gz" in output and "case_002" in output and "case_000" not in output
    assert "--clean" not in output
    (nnunet_env.preprocessed / broken.name).mkdir()
    (nnunet_env.preprocessed / broken.name / "dataset_fingerprint.json").write_text("{}")
    assert "again with --clean" in umit("doctor", "-d", str(broken))[1]
    code, output = umit("doctor", "--dataset", "77")
    assert code == 1
    assert "no data set 77" in output


def test_faults_of_dataset_json_and_of_the_disk_are_findings(
    make_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "Dataset901_Balls"
    shutil.copytree(make_dataset(cases=2), folder)
    unreadable, read = str(folder / "imagesTr" / "case_001_0000.nii.gz"), integrity._gzip_problem

    def broken_share(path: str, fix: str) -> Any:
        if path == unreadable:
            raise OSError(5, "Input/output error")
        return read(path, fix)

    monkeypatch.setattr(integrity, "_gzip_problem", broken_share)
    (problem,) = integrity.check_dataset(folder)
    assert problem.path == unreadable and "cannot be read (Input/output error)" in problem.reason
    content = json.loads((folder / "dataset.json").read_text())
    for change, reason in (
        ({"file_ending": "nii.gz"}, "file_ending is 'nii.gz'"),
        ({"labels": {"0": "background", "1": "ball"}}, "labels are {'0': 'background'"),
        ({"file_ending": ".xyz"}, "nnU-Net has no reader for them"),
    ):
        (folder / "dataset.json").write_text(json.dumps(content | change))
        code, output = umit("doctor", "-d", str(folder))
        assert code == 1 and reason in output, output


# --- train --------------------------------------------------------------------------------------------------------


def test_train_takes_options_in_any_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.run import run_training

    typed: list[list[str]] = []
    monkeypatch.setattr(run_training, "run_training_entry", lambda: typed.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["umit"])
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    behind = "900 3d_native all -tr UMITPretrainTrainer --c".split()
    before = "-tr UMITPretrainTrainer --c -p UMITPlans 900 3d_native all".split()
    for words in (behind, before):
        assert umit("train", *words)[0] == 0
    assert typed == [behind, before]


# --- run ----------------------------------------------------------------------------------------------------------


def test_run_knows_the_stock_commands_and_names_near_ones() -> None:
    assert {"nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_plan_and_preprocess"} <= set(run.stock_commands())
    assert "umit" not in run.stock_commands()
    code, output = umit("run", "nnUNetv2_trin")
    assert code == 2
    assert "did you mean nnUNetv2_train" in output


FAKE_COMMAND = """
import multiprocessing, sys
def look(name):
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
    try:
        return find("/no/such/folder", name, "nnunetv2.experiment_planning")
    except RuntimeError as error:
        return str(error)
def entry():
    print(sys.argv)
    print(look("UMITNoSuch"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(look, ("UMITNoSuch",)))
"""


@pytest.mark.parametrize("script", [True, False])
def test_run_registers_in_the_command_and_its_spawned_workers(tmp_path: Path, script: bool) -> None:
    """A refusal that lists our names proves registration: without it the look-up answers None."""
    (tmp_path / "nnunetv2_fake_command.py").write_text(FAKE_COMMAND)
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "_all = m.entry_points\n"
        "class Fake(m.EntryPoint):\n"
        "    @property\n"
        "    def module(self): return 'nnunetv2_fake_command'\n"
        "    def load(self):\n"
        "        import nnunetv2_fake_command as f; return f.entry\n"
        "m.entry_points = lambda **k: [*_all(**k), Fake('nnUNetv2_fake', 'nnunetv2.fake:entry', 'console_scripts')]\n"
    )
    command = [str(SCRIPTS / "umit")] if script else [sys.executable, "-m", "nnunet_umit.cli.app"]
    done = subprocess.run(
        [*command, "run", "nnUNetv2_fake", "27", "--help", "-tr", "UMITTrainer"],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path), registration.NO_HOOK: "1"},
    )
    lines = done.stdout.splitlines()
    assert lines[:1] == ["['nnUNetv2_fake', '27', '--help', '-tr', 'UMITTrainer']"], done.stdout + done.stderr
    assert [line.startswith("There is no planner named UMITNoSuch") for line in lines[1:]] == [True, True]
