"""Folders, plans and sub-processes of hippocampus_equal_time.py: prepare, probe, train, validate, continue."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import (
    DATASET,
    REPOSITORY,
    available_cores,
    data_root,
    provenance,
    say,
    work_folder,
    write_json,
)

CONFIGURATION = "3d_fullres"
ARMS = ("nnunet", "primus_s", "umit_scratch", "umit_shared")
STOCK = {"nnunet": "nnUNetTrainer", "primus_s": "nnUNet_Primus_S_Trainer"}
PROBE_S = 30.0
NOT_OF_A_RUN = ("arm", "results", "work", "again", "replan")  # options that do not change what a run gives


def epochs_for(iterations: float) -> int:
    """Epochs of a schedule: ten iterations or more each, 4 to 40 epochs (2 if there are hardly any iterations)."""
    return 2 if iterations < 12 else max(4, min(40, int(iterations // 10)))


def edit_plans(
    base: Path, source: str, target: str, *, batch_size: int | None = None, umit: dict[str, Any] | None = None
) -> None:
    """Write ``base/target.json``: the plans ``source`` under another name, with batch size and ``umit`` values changed.

    Args:
        umit: ``{"finetune.learning_rate": 0.001, ...}``, keys below ``configurations.3d_fullres.umit``.
    """
    plans = json.loads((base / f"{source}.json").read_text(encoding="utf-8"))
    plans["plans_name"] = target
    configuration = plans["configurations"][CONFIGURATION]
    if batch_size is not None:
        configuration["batch_size"] = batch_size
    for key, value in (umit or {}).items():
        section, _, name = key.partition(".")
        if not name or section not in configuration.get("umit", {}):
            raise ValueError(f"{key!r} is not a key below the umit block of {source}; use e.g. finetune.learning_rate")
        configuration["umit"][section][name] = value
    write_json(base / f"{target}.json", plans)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process: two invocations would replan under each other and spoil each other's clock.

    Raises:
        RuntimeError: another one holds it.
    """
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another hippocampus_equal_time is running in {folder}; wait for it (its timing counts), or use "
                "another --work folder on other cores"
            ) from error
        yield


class Bench:
    """Folders, environment and sub-processes of one invocation."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data = data_root()
        self.work = work_folder(options.work)
        self.base = self.work / "nnUNet_preprocessed" / DATASET
        self.umit_plans = options.planner.replace("Planner", "Plans", 1)

    def environment(self, results: Path) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        return os.environ | {
            "nnUNet_raw": str(self.data),
            "nnUNet_preprocessed": str(self.work / "nnUNet_preprocessed"),
            "nnUNet_results": str(results),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "2",
            "OMP_NUM_THREADS": str(self.options.threads),
            "PYTHONPATH": path,
        }

    def call(self, command: list[str], folder: Path) -> None:
        """Run ``command`` on ``--threads`` cores, output in ``folder/log.txt``; its tail is shown if it fails."""
        folder.mkdir(parents=True, exist_ok=True)
        pin: Callable[[], None] | None = None
        if hasattr(os, "sched_setaffinity") and available_cores() > self.options.threads:
            cores = sorted(os.sched_getaffinity(0))[: self.options.threads]
            pin = lambda: os.sched_setaffinity(0, cores)  # noqa: E731 - a hook of one line
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            process = subprocess.run(
                command,
                env=self.environment(folder),
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=pin,
            )
        if process.returncode:
            tail = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
            raise RuntimeError(f"{' '.join(command)} failed ({process.returncode}):\n" + "\n".join(tail))

    def prepare(self, arms: list[str]) -> None:
        """Plan and preprocess what the arms need, and put the grouped split in place."""
        wanted = []
        if any(arm in STOCK for arm in arms):
            wanted.append(("nnUNetPlans", "ExperimentPlanner"))
        if any(arm not in STOCK for arm in arms):
            wanted.append((self.umit_plans, self.options.planner))
        for plans, planner in wanted:
            if (self.base / f"{plans}.json").is_file() and (plans == "nnUNetPlans" or not self.options.replan):
                continue
            say(f"planning and preprocessing with {planner} ...")
            program = Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess"
            number = str(int(DATASET[7:10]))
            command = [str(program), "-d", number, "-pl", planner, "-c", CONFIGURATION, "-np", "2", "-npfp", "2"]
            self.call(command, self.work / "planning")
        shutil.copyfile(self.data / "splits" / f"{DATASET}.json", self.base / "splits_final.json")

    def train(self, folder: Path, name: str, **settings: Any) -> dict[str, Any]:
        """One sub-process of budgeted_training; returns its report. What an earlier, killed call finished is kept."""
        job: dict[str, Any] = {
            "dataset": DATASET,
            "configuration": CONFIGURATION,
            "fold": self.options.validation_fold,
            "seed": self.options.seed,
            "threads": self.options.threads,
            "probe": False,
            "validate": False,
            "validation_cases": 2 if self.options.quick else self.options.validation_cases,
            "pretrained_weights": None,
            "step_s": 1.0,
            "overhead_s": 0.0,
            "report": str(folder / f"{name}.report.json"),
        } | settings
        path, done = folder / f"{name}.job.json", Path(job["report"])
        if not (done.is_file() and json.loads(done.read_text(encoding="utf-8"))["finished"]):
            write_json(path, job)
            self.call([sys.executable, "-m", "benchmarks.budgeted_training", str(path)], folder)
        return json.loads(done.read_text(encoding="utf-8"))

    def run_folder(self, key: str) -> Path:
        """The folder of a run, emptied unless a killed call with the same options left it."""
        folder = self.work / "runs" / key.replace("/", "_")
        given = {name: value for name, value in vars(self.options).items() if name not in NOT_OF_A_RUN}
        options, stored = json.loads(json.dumps(given)), folder / "options.json"
        same = stored.is_file() and json.loads(stored.read_text(encoding="utf-8")) == options
        if self.options.again or self.options.replan or not same:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(stored, options)
        return folder

    def stage(
        self, folder: Path, name: str, trainer: str, plans: str, seconds: float, **settings: Any
    ) -> dict[str, Any]:
        """Probe the time of a step, fit the schedule to ``seconds``, train.

        Args:
            folder: of this run; logs, reports and checkpoints go there.
            name: ``stock``, or the section of the umit block: ``pretrain`` or ``finetune``.
            trainer, plans: names as nnU-Net knows them; the plans are copied under a name of this run, then edited.
            seconds: training wall time.
        """
        target = f"{plans}Bench{hashlib.sha1(str(folder.name).encode()).hexdigest()[:6]}"
        batch = 2 if self.options.quick else None
        overrides: dict[str, Any] = {}
        if name != "stock":
            fixed = {f"{name}.val_iterations_per_epoch": 1, f"{name}.seed": self.options.seed}
            overrides = dict(self.options.set) | fixed
        step_s, overhead_s, epochs = 1.0, 0.0, 2
        if not self.options.quick:
            probe_plan = overrides if name == "stock" else overrides | {f"{name}.epochs": 2}
            edit_plans(self.base, plans, target, batch_size=batch, umit=probe_plan)
            probe_s = min(PROBE_S, seconds)
            found = self.train(
                folder, f"{name}_probe", trainer=trainer, plans=target, budget_s=probe_s, epochs=2, probe=True
            )
            step_s, overhead_s = found["last_step_s"], found["last_overhead_s"]
            epochs = epochs_for(seconds / step_s)
        iterations = max(1, round((seconds / epochs - overhead_s) / step_s))
        if name != "stock":
            overrides |= {f"{name}.epochs": epochs, f"{name}.iterations_per_epoch": iterations}
        edit_plans(self.base, plans, target, batch_size=batch, umit=overrides)
        say(f"  {name}: {step_s:.2f} s a step, {epochs} epochs of about {iterations} iterations in {seconds:.0f} s")
        return self.train(
            folder, name, trainer=trainer, plans=target, budget_s=seconds, epochs=epochs,
            step_s=step_s, overhead_s=overhead_s, **settings,
        )  # fmt: skip

    def arm(self, arm: str, key: str) -> dict[str, Any]:
        """Run one arm; returns its result."""
        seconds = self.options.minutes * 60
        folder = self.run_folder(key)
        started = time.perf_counter()
        if arm in STOCK:
            stages = [self.stage(folder, "stock", STOCK[arm], "nnUNetPlans", seconds, validate=True)]
        elif arm == "umit_scratch":
            stages = [self.stage(folder, "finetune", "UMITTrainer", self.umit_plans, seconds, validate=True)]
        else:
            share = self.options.pretrain_share
            first = self.stage(folder, "pretrain", "UMITPretrainTrainer", self.umit_plans, share * seconds)
            second = self.stage(
                folder, "finetune", "UMITTrainer", self.umit_plans, (1 - share) * seconds,
                validate=True, pretrained_weights=first["checkpoint"],
            )  # fmt: skip
            stages = [first, second]
        for stage in stages:
            del stage["checkpoint"], stage["finished"]
        return {
            "arm": arm,
            "minutes": self.options.minutes,
            "fold": self.options.validation_fold,
            "seed": self.options.seed,
            "cores": self.options.threads,
            "umit_values": dict(self.options.set) if arm not in STOCK else {},
            "iterations": sum(stage["iterations"] for stage in stages),
            "train_wall_s": sum(stage["wall_s"] for stage in stages),
            "train_cpu_s": sum(stage["cpu_s"] for stage in stages),
            "dice": stages[-1]["dice"],
            "stages": stages,
            "everything_s": time.perf_counter() - started,
            **provenance(),
        }
