"""Equal training time for every arm: plans, folders, and what a killed call leaves; nothing is trained."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    accuracy,
    common,
    equal_time,
)
from benchmarks.common import Results


def test_epochs_keep_ten_iterations_and_stay_within_bounds():
    assert [equal_time.epochs_for(n) for n in (3, 30, 170, 5000)] == [2, 4, 17, 40]


def test_plans_are_copied_under_another_name_and_edited(tmp_path):
    umit = {"finetune": {"epochs": 500, "learning_rate": 1e-3}, "pretrain": {}}
    configuration = {"batch_size": 4, "umit": umit, "architecture": {"arch_kwargs": {"depth": 8}}}
    plans = {"plans_name": "UMITPlans", "configurations": {"3d_fullres": configuration}}
    (tmp_path / "UMITPlans.json").write_text(json.dumps(plans))
    equal_time.edit_plans(tmp_path, "UMITPlans", "Other", batch_size=2, umit={"finetune.epochs": 7})
    written = json.loads((tmp_path / "Other.json").read_text())
    assert written["plans_name"] == "Other"
    assert written["configurations"]["3d_fullres"]["batch_size"] == 2
    assert written["configurations"]["3d_fullres"]["umit"]["finetune"] == {"epochs": 7, "learning_rate": 1e-3}
    assert json.loads((tmp_path / "UMITPlans.json").read_text()) == plans
    equal_time.edit_plans(tmp_path, "UMITPlans", "Other", configuration="3d_fullres", batch_size=3)
    assert json.loads((tmp_path / "Other.json").read_text())["configurations"]["3d_fullres"]["batch_size"] == 3
    equal_time.edit_plans(tmp_path, "UMITPlans", "Other", umit={"architecture.depth": 6})
    written = json.loads((tmp_path / "Other.json").read_text())["configurations"]["3d_fullres"]
    assert written["architecture"]["arch_kwargs"] == {"depth": 6}
    with pytest.raises(ValueError, match="'finetun.epochs' is not a key below the umit block of UMITPlans"):
        equal_time.edit_plans(tmp_path, "UMITPlans", "Other", umit={"finetun.epochs": 7})


def test_primus_gets_a_patch_of_whole_tokens_and_nobody_else_another_patch(tmp_path):
    plans = {"plans_name": "nnUNetPlans", "configurations": {"3d_fullres": {"patch_size": [14, 256, 224]}}}
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert equal_time.demanded("nnUNetTrainer", tmp_path, "nnUNetPlans") == {}
    changed = equal_time.demanded("nnUNet_Primus_S_Trainer", tmp_path, "nnUNetPlans")
    assert changed == {"configuration.patch_size": [16, 256, 224]}
    equal_time.edit_plans(tmp_path, "nnUNetPlans", "Other", umit=changed)
    written = json.loads((tmp_path / "Other.json").read_text())["configurations"]["3d_fullres"]
    assert written["patch_size"] == [16, 256, 224]


def test_another_budget_has_a_plot_of_its_own():
    assert accuracy.picture_name("hippocampus", 20.0) == "accuracy_hippocampus"
    assert accuracy.picture_name("hippocampus", 60.0) == "accuracy_hippocampus_60min"
    assert accuracy.picture_name("acdc", 0.1, quick=True) == "accuracy_acdc_quick"


def test_settings_of_the_command_line():
    assert common.setting("finetune.epochs=7") == ("finetune.epochs", 7)
    assert common.setting("finetune.schedule=poly") == ("finetune.schedule", "poly")
    with pytest.raises(argparse.ArgumentTypeError, match="is not KEY=VALUE"):
        common.setting("finetune.epochs")


def test_finished_arms_are_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "Bench", lambda *given, **named: pytest.fail("nothing is left to run"))
    dice = {"mean": 0.5, "per_class": {"1": 0.4, "2": 0.6}, "cases": 42}
    curve = [{"wall_s": 300.0, "dice": dice | {"cases": 12}}, {"wall_s": 840.0, "dice": dice | {"cases": 12}}]
    stage = {"iterations": 5, "batch_size": 4, "wall_s": 360.0}
    results = Results("accuracy", "claim", tmp_path)
    for arm, seeds in accuracy.TASKS["hippocampus"].seeds.items():
        for seed in range(1, seeds + 1):
            last = stage | {"curve": curve}
            run = {"arm": arm, "seed": seed, "train_wall_s": 1200.0, "train_cpu_s": 2400.0, "dice": dice}
            run["stages"] = [stage, last] if arm == "umit_shared" else [last]
            results.put(f"full/hippocampus/fold0/20min/seed{seed}/{arm}", run)
    accuracy.main(["--full", "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "0.4000 / 0.6000" in printed and "5 + 5" in printed and "mean of 3" in printed
    assert (tmp_path / "accuracy_hippocampus.png").stat().st_size > 0
    shared = results.get("full/hippocampus/fold0/20min/seed1/umit_shared")
    assert accuracy.curve_of(shared) == [(11.0, 0.5), (20.0, 0.5)], "minutes of the pre-training count"


def test_two_runs_cannot_share_a_folder(tmp_path):
    with equal_time.alone_in(tmp_path):
        with pytest.raises(RuntimeError, match="another benchmark, or a training that a killed one left, is running"):
            with equal_time.alone_in(tmp_path):
                pytest.fail("the folder was taken")
    with equal_time.alone_in(tmp_path):
        pass


def test_a_training_that_a_killed_benchmark_left_holds_the_folder(tmp_path, monkeypatch):
    bench, pipe = bench_of(tmp_path, monkeypatch), tmp_path / "pipe"
    os.mkfifo(pipe)
    with equal_time.alone_in(tmp_path):
        bench.call(["sh", "-c", f"read line < {pipe} &"], tmp_path / "log")
    try:
        with pytest.raises(RuntimeError, match="a training that a killed one left, is running in"):
            with equal_time.alone_in(tmp_path):
                pytest.fail("the folder was taken")
    finally:
        pipe.write_text("end\n")
    with open(tmp_path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits for its end


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    (tmp_path / common.DATASET).mkdir()
    (tmp_path / common.DATASET / "dataset.json").write_text("{}")
    monkeypatch.setenv("UMIT_DATA", str(tmp_path))
    options = argparse.Namespace(
        arm=None, results=None, work=str(tmp_path), again=False, replan=False, planner="UMITPlanner", quick=False,
        validation_fold=0, validation_cases=None, seed=1, threads=1, set=[("finetune.epochs", 3)], device="cpu",
    )  # fmt: skip
    bench = equal_time.Bench(options)
    calls: list[list[str]] = []

    def finish(command: list[str], folder: Path) -> None:
        calls.append(command)
        job = json.loads(Path(command[-1]).read_text())
        finished = len(calls) != 1  # the first call: trained, then killed
        Path(job["report"]).write_text(json.dumps({"finished": finished}))

    monkeypatch.setattr(bench, "call", finish)
    write_plans(bench)
    folder = bench.run_folder("full/arm")
    with pytest.raises(ValueError, match="fold 0 of Dataset004_Hippocampus is to be trained, but .* has 0 folds"):
        bench.train(folder, "stock", trainer="T", plans="P", budget_s=1.0, epochs=2)
    bench.set_fold({"train": ["a"], "val": ["b"]})
    for expected in (1, 2, 2):
        assert bench.run_folder("full/arm") == folder
        bench.train(folder, "stock", trainer="T", plans="P", budget_s=1.0, epochs=2)
        assert len(calls) == expected
    write_plans(bench, balance=0.5)
    bench.train(folder, "stock", trainer="T", plans="P", budget_s=1.0, epochs=2)
    assert len(calls) == 3, "other plans: what was trained with the old ones is not kept"
    bench.set_fold({"train": ["a", "c"], "val": ["b"]})
    bench.train(folder, "stock", trainer="T", plans="P", budget_s=1.0, epochs=2)
    assert len(calls) == 4, "other cases"
    options.seed = 2
    bench.run_folder("full/arm")
    assert not (folder / "stock.report.json").exists(), "another run: nothing of the old one is kept"


def write_plans(bench: equal_time.Bench, **values: Any) -> None:
    """Plans ``P`` of nothing but some values."""
    bench.base.mkdir(parents=True, exist_ok=True)
    (bench.base / "P.json").write_text(json.dumps(values))


def bench_of(work: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> equal_time.Bench:
    """A bench over an empty data folder."""
    (work / common.DATASET).mkdir(exist_ok=True)
    (work / common.DATASET / "dataset.json").write_text("{}")
    monkeypatch.setenv("UMIT_DATA", str(work))
    options = argparse.Namespace(
        work=str(work), again=False, replan=False, quick=False, validation_fold=0, validation_cases=None, seed=1,
        threads=1, set=[], device="cpu",
    )  # fmt: skip
    return equal_time.Bench(options, **settings)


def test_planning_is_done_for_what_is_missing(tmp_path, monkeypatch):
    bench = bench_of(tmp_path, monkeypatch)
    bench.options.threads = 3
    calls: list[list[str]] = []
    monkeypatch.setattr(bench, "call", lambda command, folder: calls.append(command[1:]))
    bench.plan("nnUNetPlans", ["3d_fullres"])
    planned = ["-d", "4", "-pl", "ExperimentPlanner", "-c", "3d_fullres", "-np", "3", "-npfp", "3"]
    assert calls == [planned]

    configurations = {name: {"data_identifier": f"UMITPlans_{name}"} for name in ("3d_fullres", "3d_native")}
    (bench.base / "UMITPlans_3d_fullres").mkdir(parents=True)
    (bench.base / "UMITPlans.json").write_text(json.dumps({"configurations": configurations}))
    (bench.base / "dataset.json").write_text(json.dumps({"numTraining": 2}))
    for case in "ab":
        assert not bench.is_preprocessed("UMITPlans", "3d_fullres"), "a killed preprocessing is not complete"
        (bench.base / "UMITPlans_3d_fullres" / f"{case}.pkl").touch()
    bench.plan("UMITPlans", ["3d_fullres"])
    assert len(calls) == 1 and not bench.is_preprocessed("UMITPlans", "3d_native")
    bench.plan("UMITPlans", ["3d_fullres", "3d_native"])
    assert calls[1][3:7] == ["UMITPlanner", "-c", "3d_fullres", "3d_native"]
    bench.options.replan = True
    bench.plan("UMITPlans", ["3d_fullres"])
    assert len(calls) == 3


def test_jobs_name_what_the_bench_stands_for(tmp_path, monkeypatch):
    bench = bench_of(
        tmp_path, monkeypatch, dataset="Dataset900_Corpus", configuration="3d_native", fold="all", seed=7, room="room",
        settings={"minutes": 2},
    )  # fmt: skip
    assert bench.environment(tmp_path)["nnUNet_raw"] == str(bench.work / "nnUNet_raw")
    jobs: list[dict[str, Any]] = []

    def finish(command: list[str], folder: Path) -> None:
        jobs.append(json.loads(Path(command[-1]).read_text()))
        Path(jobs[-1]["report"]).write_text(json.dumps({"finished": True}))

    monkeypatch.setattr(bench, "call", finish)
    write_plans(bench)
    folder = bench.run_folder("full/corpus")
    bench.train(folder, "pretrain", trainer="T", plans="P", budget_s=1.0, epochs=2)
    assert [jobs[0][name] for name in ("dataset", "configuration", "fold", "seed")] == [
        "Dataset900_Corpus", "3d_native", "all", 7,
    ]  # fmt: skip
    assert json.loads((folder / "options.json").read_text()) == {"minutes": 2, "device": "cpu"}
    with pytest.raises(FileNotFoundError, match="train again with --again"):
        bench.model(folder, "T", "P")
    model = folder / "Dataset900_Corpus" / f"T__{equal_time.plans_copy('P', folder)}__3d_native"
    (model / "fold_all").mkdir(parents=True)
    (model / "fold_all" / "checkpoint_final.pth").touch()
    assert bench.model(folder, "T", "P") == model


def test_a_command_may_end_with_an_accepted_code(tmp_path, monkeypatch):
    bench = bench_of(tmp_path, monkeypatch)
    assert bench.call(["sh", "-c", "exit 1"], tmp_path / "log", accepted=(0, 1)) == 1
    with pytest.raises(RuntimeError, match=r"failed \(2\):\nreason"):
        bench.call(["sh", "-c", "echo reason; exit 2"], tmp_path / "log", accepted=(0, 1))


def test_stages_are_added_up_without_paths():
    first = {"iterations": 2, "wall_s": 3.0, "cpu_s": 5.0, "checkpoint": "/a/b", "finished": True}
    second = first | {"iterations": 4, "dice": {"mean": 0.5}}
    assert equal_time.totals([first, second]) == {
        "iterations": 6,
        "train_wall_s": 6.0,
        "train_cpu_s": 10.0,
        "dice": {"mean": 0.5},
        "stages": [
            {"iterations": 2, "wall_s": 3.0, "cpu_s": 5.0},
            {"iterations": 4, "wall_s": 3.0, "cpu_s": 5.0, "dice": {"mean": 0.5}},
        ],
    }
    assert "dice" not in equal_time.totals([first])


def test_minutes_are_those_asked_for_or_those_of_the_mode():
    assert [common.budget(2.0, True, 15.0), common.budget(None, False, 15.0)] == [2.0, 15.0]
    assert common.budget(None, True, 15.0) == pytest.approx(8 / 60)
    with pytest.raises(ValueError, match="--minutes 0 must be above 0"):
        common.budget(0.0, False, 15.0)


def test_tuning_runs_need_a_tag(capsys):
    with pytest.raises(SystemExit):
        accuracy.main(["--quick", "--set", "finetune.learning_rate=1"])
    assert "--tag" in capsys.readouterr().err
