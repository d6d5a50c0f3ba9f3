"""`umit demo`: virtual subjects, part of a user's data set, running commands, the report, and the whole demo."""

import json
import os
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from nnunet_umit.cli import demo_data, demo_report, stock, virtual_subjects
from nnunet_umit.cli.demo import MARKER, demo, prepare_folder
from nnunet_umit.cli.demo_budget import EPOCHS, Budget, set_budget
from nnunet_umit.cli.demo_data import DemoData, DemoError
from nnunet_umit.cli.virtual_subjects import ISOTROPIC, THICK
from nnunet_umit.config import UMITConfig

nib = pytest.importorskip("nibabel")


@pytest.fixture(scope="module")
def template():
    pytest.importorskip("nilearn")
    return virtual_subjects.load_template()


@pytest.fixture(scope="module")
def virtual(tmp_path_factory) -> DemoData:
    pytest.importorskip("nilearn")
    return demo_data.virtual_dataset(tmp_path_factory.mktemp("raw"))


def call(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and output of `umit demo` run in this process, on one long line."""
    app = typer.Typer()
    app.command()(demo)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output.replace("\n", " ")


# ------------------------------------------------------------------------------------------------ virtual subjects


def test_equal_seeds_give_equal_subjects_and_others_differ(template):
    first, again, other = (virtual_subjects.make_subject(template, ISOTROPIC, (5, n)) for n in (1, 1, 2))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.labels, again.labels)
    assert (first.labels != other.labels).mean() > 0.1


def test_subject_has_all_tissues_and_contrast_between_them(template):
    subject = virtual_subjects.make_subject(template, ISOTROPIC, (5, 3))
    share = np.bincount(subject.labels.ravel(), minlength=3) / subject.labels.size
    assert share.shape == (3,) and (share > 0.1).all()
    background, grey, white = (subject.image[subject.labels == label].mean() for label in range(3))
    assert background < 0.7 * grey and grey < 0.95 * white and 500 < white < 1500


def test_thick_slices_show_the_same_brain(template):
    """Same seed, same body: a thick voxel mostly holds the tissue of one of its two thin ones."""
    thin, thick = (virtual_subjects.make_subject(template, how, (5, 4)) for how in (ISOTROPIC, THICK))
    assert thick.labels.shape == (*thin.labels.shape[:2], thin.labels.shape[2] // 2)
    same = (thin.labels[..., ::2] == thick.labels) | (thin.labels[..., 1::2] == thick.labels)
    assert same.mean() > 0.95
    assert np.allclose(np.linalg.norm(thick.affine[:3, :3], axis=0), THICK.spacing)


@pytest.mark.parametrize("seed", range(20))
def test_deformation_does_not_fold(seed):
    positions = virtual_subjects.warped_positions(np.random.default_rng(seed), ISOTROPIC)
    gradients = np.stack([np.gradient(component, *ISOTROPIC.spacing) for component in positions])
    determinant = np.linalg.det(np.moveaxis(gradients, (0, 1), (-2, -1)))
    assert determinant.min() > 0.2


def test_virtual_dataset_is_nnunet_raw(virtual):
    description = json.loads((virtual.folder / "dataset.json").read_text())
    uses = (virtual.training, virtual.validation, virtual.unlabelled, virtual.test)
    names = [case for use in uses for case in use]
    assert len(set(names)) == len(names) == 20
    training = sorted(names[: -len(virtual.test)])
    assert description["numTraining"] == len(training)
    for part, cases in (("Tr", training), ("Ts", sorted(virtual.test))):
        images = sorted(file.name for file in (virtual.folder / f"images{part}").iterdir())
        labels = sorted(file.name for file in (virtual.folder / f"labels{part}").iterdir())
        assert images == [f"{case}_0000.nii.gz" for case in cases]
        assert labels == [f"{case}.nii.gz" for case in cases]
    assert {case for cases in virtual.groups.values() for case in cases} == set(virtual.test)
    source = (virtual.folder / "SOURCE.md").read_text()
    assert "McConnell Brain Imaging Centre" in source and "nilearn" in source and "10.1016" in source


def test_virtual_dataset_passes_nnunets_own_check(virtual):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    verify_dataset_integrity(str(virtual.folder), num_processes=1)


def test_median_spacing_of_the_training_cases_is_isotropic(virtual):
    files = [
        virtual.folder / "imagesTr" / f"{case}_0000.nii.gz"
        for case in (*virtual.training, *virtual.validation, *virtual.unlabelled)
    ]
    spacings = np.array([nib.load(file).header.get_zooms() for file in files])
    assert np.median(spacings, axis=0).tolist() == [3, 3, 3] and spacings[:, 2].max() == 6


def test_missing_nilearn_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    monkeypatch.setitem(sys.modules, "nilearn.datasets", None)
    code, output = call("--out", tmp_path / "out", "--device", "cpu")
    assert code == 1 and 'pip install "nnunet-umit[demo]"' in output and "--dataset" in output


# ------------------------------------------------------------------------------------------- the user's own data set


def raw_dataset(folder: Path, cases: int, channels: int = 2) -> Path:
    """Empty files in nnU-Net's layout: the choice of cases reads none of them."""
    for index in range(cases):
        for file in (
            *(folder / "imagesTr" / f"scan_{index:03d}_{channel:04d}.nii.gz" for channel in range(channels)),
            folder / "labelsTr" / f"scan_{index:03d}.nii.gz",
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(file.name)
    description = {
        "channel_names": {str(channel): "MRI" for channel in range(channels)},
        "labels": {"background": 0, "organ": 1},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize("cases", [4, 5, 9, 12, 20, 60])
def test_part_of_dataset_is_disjoint_and_repeatable(tmp_path, cases):
    source = raw_dataset(tmp_path / "Dataset042_Organ", cases)
    data, again = (demo_data.part_of_dataset(source, tmp_path / name) for name in ("one", "two"))
    uses = (data.training, data.validation, data.unlabelled, data.test)
    names = [case for use in uses for case in use]
    assert uses == (again.training, again.validation, again.unlabelled, again.test)
    assert len(set(names)) == len(names) == min(cases, 20)
    assert data.training and data.validation and data.test
    assert (data.name, data.identifier) == ("Dataset042_Organ", "42")
    listed = data.description()["dataset"]
    assert sorted(listed) == sorted(set(names) - set(data.test))
    for entry in listed.values():
        assert len(entry["images"]) == 2
        assert all(Path(file).is_absolute() and Path(file).is_file() for file in (*entry["images"], entry["label"]))
    copied = sorted(file.name for file in (data.folder / "imagesTs").iterdir())
    assert copied == [f"{case}_{channel:04d}.nii.gz" for case in data.test for channel in range(2)]


def test_own_folder_name_without_a_number_gets_one(tmp_path):
    data = demo_data.part_of_dataset(raw_dataset(tmp_path / "organ", 6), tmp_path / "raw")
    assert data.name == "Dataset901_Own"


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("", "no such folder"),
        ("dataset.json", "dataset.json is missing"),
        ("imagesTr", "imagesTr is missing"),
        ("labelsTr", "labelsTr is missing"),
        ("imagesTr/scan_002_0001.nii.gz", "scan_002_0001.nii.gz"),
    ],
)
def test_incomplete_dataset_is_named(tmp_path, remove, message):
    source = raw_dataset(tmp_path / "Dataset042_Organ", 6)
    (source / remove).rename(tmp_path / "elsewhere")
    code, output = call("--dataset", source, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 1 and message in output and "Traceback" not in output


def test_too_few_cases_and_broken_json(tmp_path):
    source = raw_dataset(tmp_path / "Dataset042_Organ", 3)
    with pytest.raises(DemoError, match="has 3 labelled cases; the demo needs 4"):
        demo_data.part_of_dataset(source, tmp_path / "raw")
    (source / "dataset.json").write_text("{")
    with pytest.raises(DemoError, match="not valid JSON"):
        demo_data.part_of_dataset(source, tmp_path / "raw")
    (source / "dataset.json").write_text('{"labels": {}}')
    with pytest.raises(DemoError, match="lacks channel_names, file_ending"):
        demo_data.part_of_dataset(source, tmp_path / "raw")


# ------------------------------------------------------------------------------------------------- the output folder


def test_foreign_folder_is_refused_and_left_alone(tmp_path):
    precious = tmp_path / "predictions" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    code, output = call("--out", tmp_path, "--device", "cpu")
    assert code == 1 and "not made by umit demo" in output and str(tmp_path) in output
    assert precious.read_text() == "years of work" and list(tmp_path.iterdir()) == [precious.parent]


def test_own_folder_is_emptied_but_strangers_in_it_stay(tmp_path):
    out = tmp_path / "out"
    prepare_folder(out, None)
    (out / "logs").mkdir()
    (out / "notes.txt").write_text("mine")
    prepare_folder(out, None)
    assert sorted(file.name for file in out.iterdir()) == ["notes.txt", MARKER]


def test_dataset_inside_the_output_folder_and_file_as_folder(tmp_path):
    out = tmp_path / "out"
    prepare_folder(out, None)
    with pytest.raises(DemoError, match="lies in --out"):
        prepare_folder(out, out / "nnUNet_raw" / "Dataset900_VirtualSubjects")
    (tmp_path / "file").touch()
    with pytest.raises(DemoError, match="is a file"):
        prepare_folder(tmp_path / "file", None)


def test_unknown_device(tmp_path):
    code, output = call("--out", tmp_path / "out", "--device", "tpu")
    assert code == 1 and "--device tpu is not known" in output and not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- running commands


def python(monkeypatch) -> None:
    """Let the runner start Python instead of an nnU-Net command."""
    monkeypatch.setattr(stock, "find_command", lambda name: Path(sys.executable))


def runner(folder: Path) -> tuple[stock.StockRunner, Console]:
    console = Console(record=True, width=200, force_terminal=False, file=(folder / "console.txt").open("w"))
    return stock.StockRunner(console, folder / "logs", total=2), console


def test_failure_shows_last_lines_code_and_log(tmp_path, monkeypatch):
    python(monkeypatch)
    commands, _ = runner(tmp_path)
    code = "import sys\nfor i in range(40): print('line', i)\nsys.exit('no space left')"
    with pytest.raises(stock.StockCommandError) as caught:
        commands.run("train", "nnUNetv2_train", "-c", code, environment=os.environ)
    message = str(caught.value)
    log = tmp_path / "logs" / "01_nnUNetv2_train.log"
    assert "exit code 1" in message and "no space left" in message and str(log) in message
    assert "line 39" in message and "line 5\n" not in message
    assert log.read_text().startswith("$ nnUNetv2_train -c") and "line 5\n" in log.read_text()


def test_success_is_timed_and_told_in_plain_lines(tmp_path, monkeypatch):
    python(monkeypatch)
    commands, console = runner(tmp_path)
    commands.run("plan", "nnUNetv2_plan", "-c", r"print('10%\r20%\rdone')", environment=os.environ, epochs=3)
    assert [step.title for step in commands.steps] == ["plan"] and 0 < commands.steps[0].seconds < 60
    assert console.export_text().splitlines()[0] == "[1/2] plan ..."
    assert (tmp_path / "logs" / "01_nnUNetv2_plan.log").read_text().splitlines()[-3:] == ["10%", "20%", "done"]


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_interrupted_command_does_not_live_on(tmp_path):
    code = (
        "import subprocess, sys, signal\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "print(child.pid, flush=True)\nsignal.pause()"
    )
    children = []

    def interrupt(line: str) -> None:
        children.append(int(line))
        raise KeyboardInterrupt

    with (tmp_path / "log").open("w") as log, pytest.raises(KeyboardInterrupt):
        stock._run([sys.executable, "-c", code], os.environ, log, deque(), interrupt)
    deadline = time.monotonic() + 30
    while alive(children[0]):
        assert time.monotonic() < deadline, "the command's own process outlived it"


def alive(pid: int) -> bool:
    """Whether a process still runs; a zombie that nobody has collected yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.is_file() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_missing_command_names_the_interpreter(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(stock.sysconfig, "get_path", lambda name, scheme=None: str(tmp_path / (scheme or "scripts")))
    monkeypatch.setattr(stock.site, "ENABLE_USER_SITE", False)
    user = tmp_path / stock.sysconfig.get_preferred_scheme("user")
    user.mkdir()
    (user / "nnUNetv2_train").touch()
    with pytest.raises(stock.StockCommandError, match="nnUNetv2_train is not installed next to .*pip install nnunetv2"):
        stock.find_command("nnUNetv2_train")
    monkeypatch.setattr(stock.site, "ENABLE_USER_SITE", True)
    assert stock.find_command("nnUNetv2_train") == user / "nnUNetv2_train"


def test_without_the_start_up_hook_commands_run_through_umit_run(tmp_path, monkeypatch):
    monkeypatch.setattr(stock, "mechanism", lambda: stock.START_UP)
    assert stock.start_of("nnUNetv2_train") == [str(stock.find_command("nnUNetv2_train"))]
    monkeypatch.setattr(stock, "mechanism", lambda: "register()")
    commands, _ = runner(tmp_path)
    with pytest.raises(stock.StockCommandError, match="no command 'nnUNetv2_tran'; did you mean nnUNetv2_train"):
        commands.run("train", "nnUNetv2_tran", "--anything", environment=os.environ | {"NNUNET_UMIT_NO_HOOK": "1"})


def test_environment_of_the_caller_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/somewhere/else")
    environment = stock.stock_environment(tmp_path / "r", tmp_path / "p", tmp_path / "m", cores=2)
    assert environment["nnUNet_raw"] == str(tmp_path / "r") and os.environ["nnUNet_raw"] == "/somewhere/else"
    assert (environment["nnUNet_def_n_proc"], environment["nnUNet_n_proc_DA"]) == ("1", "1")


# ------------------------------------------------------------------------------------------------- budget and report


def test_budget_grows_with_time_and_shrinks_with_voxels():
    short, long = (Budget.from_minutes(minutes, 120_000) for minutes in (4, 8))
    big = Budget.from_minutes(8, 1_200_000)
    none = Budget.from_minutes(0.1, 120_000)
    for name in ("pretrain_steps", "finetune_steps"):
        assert getattr(none, name) == EPOCHS <= getattr(big, name) < getattr(short, name) < getattr(long, name)
        assert getattr(long, name) % EPOCHS == 0


def test_budget_leaves_a_valid_block_with_the_promised_steps():
    block = UMITConfig().to_dict()
    planned = UMITConfig().to_dict()
    set_budget(block, Budget(pretrain_steps=120, finetune_steps=40))
    config = UMITConfig.from_dict(block)
    assert config.pretrain.epochs * config.pretrain.iterations_per_epoch == 120
    assert config.finetune.epochs * config.finetune.iterations_per_epoch == 40
    assert block["finetune"]["learning_rate"] == planned["finetune"]["learning_rate"]


def predictions(data: DemoData, folder: Path) -> tuple[Path, demo_report.Scores]:
    """The truth itself as prediction, and a summary in nnU-Net's form with known Dice; label 2 unknown in one case."""
    entries = []
    for number, case in enumerate(data.test):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{case}.nii.gz").write_bytes((data.folder / "labelsTs" / f"{case}.nii.gz").read_bytes())
        second = float("nan") if number == 0 else 0.8
        metrics = {"1": {"Dice": 0.1 * (number + 1)}, "2": {"Dice": second}}
        entries.append({"reference_file": f"/truth/{case}.nii.gz", "metrics": metrics})
    (folder / "summary.json").write_text(json.dumps({"metric_per_case": entries}))
    return folder, demo_report.read_scores(folder / "summary.json", data)


def test_scores_leave_unknown_dice_out(virtual, tmp_path):
    _, scores = predictions(virtual, tmp_path / "arm")
    assert scores.labels == pytest.approx({"grey matter": 0.25, "white matter": 0.8})
    assert scores.mean == pytest.approx(0.525)
    assert scores.cases[virtual.test[0]] == pytest.approx(0.1)
    assert list(scores.groups.values()) == pytest.approx([(0.1 + 0.3 + 0.8) / 3, (0.2 + 0.4 + 1.6) / 4])


def test_missing_held_out_case_is_an_error(virtual, tmp_path):
    (tmp_path / "summary.json").write_text('{"metric_per_case": []}')
    with pytest.raises(DemoError, match=virtual.test[0]):
        demo_report.read_scores(tmp_path / "summary.json", virtual)


def test_regions_have_nnunets_keys():
    labels = {"background": 0, "whole": [1, 2], "core": [2], "edge": 3, "ignore": 4}
    assert demo_report.foreground({"labels": labels}) == {"whole": "(1, 2)", "core": "(2,)", "edge": "3"}


def test_picture_keeps_the_aspect_of_thick_slices(virtual, tmp_path):
    from matplotlib.image import imread

    folder, scores = predictions(virtual, tmp_path / "arm")
    volume = np.random.default_rng(0).random((32, 48, 40), dtype=np.float32)
    masked = np.where(volume > 0.3, np.nan, volume).astype(np.float32)
    reconstruction = demo_report.Reconstruction(
        image=volume, masked=masked, filled=volume, spacing=(3, 3, 3), mask_ratio=0.75
    )
    arms = {"from scratch": folder, "pre-trained": folder}
    file = tmp_path / "demo.png"
    demo_report.draw_picture(file, virtual, arms, dict.fromkeys(arms, scores), reconstruction)
    picture = imread(file)
    assert picture.shape[0] > 900 and picture.shape[1] > 900 and picture.std() > 0.1
    view = demo_report.View(axis=1, index=0, upwards=True)
    assert view.aspect((6, 3, 3)) == 2 and view.proportion(np.zeros((16, 48, 40)), (6, 3, 3)) == pytest.approx(0.8)


# ---------------------------------------------------------------------------------------------------- the whole demo


@pytest.mark.end_to_end
def test_whole_demo(tmp_path):
    pytest.importorskip("nilearn")
    out = tmp_path / "out"
    code, output = call("--out", out, "--minutes", "0.1", "--device", "cpu")
    assert code == 0, output
    assert "Dice on 2 held-out cases" in output and "not a benchmark" in output
    results = json.loads((out / MARKER).read_text())
    assert results["steps"] == {"pretrain_steps": EPOCHS, "finetune_steps": EPOCHS}
    assert set(results["dice"]) == {"from scratch", "pre-trained"}
    for arm in results["dice"].values():
        assert set(arm["labels"]) == {"grey matter", "white matter"} and 0 <= arm["mean"] <= 1
    assert (out / "demo.png").stat().st_size > 10_000
    assert len(list((out / "logs").iterdir())) == 8
    assert "nnUNet_raw" not in os.environ or os.environ["nnUNet_raw"] != str(out / "nnUNet_raw")
