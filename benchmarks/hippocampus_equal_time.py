"""Dice on the hippocampus after the same training wall time: nnU-Net, Primus-S, UMIT from scratch, UMIT pre-trained.

Every arm gets ``--minutes`` (20) of training wall time on ``--threads`` (2) cores, in a process of its own, on one fold
of the grouped split, and is validated by nnU-Net itself (sliding window, mirroring, summary.json). Schedules are fitted
to the budget: see budgeted_training.py for what the clock counts. Arms:

- ``nnunet``       nnUNetTrainer on nnU-Net's default plans, 3d_fullres;
- ``primus_s``     nnUNet_Primus_S_Trainer on the same plans;
- ``umit_scratch`` UMITTrainer on UMITPlans;
- ``umit_shared``  UMITPretrainTrainer on the training images of the fold for ``--pretrain-share`` (0.3) of the budget,
  then UMITTrainer from its checkpoint for the rest.

One seed and one run an arm: differences of a point of Dice mean nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import (
    DATASET,
    REPOSITORY,
    Results,
    available_cores,
    data_root,
    parser,
    provenance,
    say,
    table,
    work_folder,
    write_json,
)

CONFIGURATION = "3d_fullres"
CLAIM = "mean foreground Dice on a grouped validation fold after equal training wall time on equal cores"
ARMS = ("nnunet", "primus_s", "umit_scratch", "umit_shared")
STOCK = {"nnunet": "nnUNetTrainer", "primus_s": "nnUNet_Primus_S_Trainer"}
PROBE_S = 30.0


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
        """One sub-process of budgeted_training; returns its report."""
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
        path = folder / f"{name}.job.json"
        write_json(path, job)
        self.call([sys.executable, "-m", "benchmarks.budgeted_training", str(path)], folder)
        return json.loads(Path(job["report"]).read_text(encoding="utf-8"))

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
        folder = self.work / "runs" / key.replace("/", "_")
        shutil.rmtree(folder, ignore_errors=True)
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
            stage.pop("checkpoint")
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


def setting(text: str) -> tuple[str, Any]:
    """``finetune.learning_rate=0.002`` -> key and value (JSON; a bare word is a string)."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, e.g. finetune.learning_rate=0.002")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def report(runs: dict[str, Any], prefix: str) -> str:
    """Table of the finished arms whose key starts with ``prefix``."""
    rows = []
    for key, run in runs.items():
        if not key.startswith(prefix):
            continue
        classes = " / ".join(f"{dice:.4f}" for dice in run["dice"]["per_class"].values())
        steps = " + ".join(str(stage["iterations"]) for stage in run["stages"])
        batch = " + ".join(str(stage["batch_size"]) for stage in run["stages"])
        rows.append(
            [key.removeprefix(prefix), steps, batch, round(run["train_wall_s"]), round(run["train_cpu_s"]),
             f"{run['dice']['mean']:.4f}", classes, run["dice"]["cases"]]
        )  # fmt: skip
    headers = ["arm", "iterations", "batch", "wall s", "CPU s", "Dice", "Dice anterior / posterior", "cases"]
    return table(headers, rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the arms that are not done yet, then print the table of all."""
    options_parser = parser(__doc__)
    add = options_parser.add_argument
    add("--arm", action="append", choices=ARMS, help="run this arm only (may be repeated; default: all four)")
    add("--minutes", type=float, default=None, help="training wall time of each arm (default 20; quick: 8 seconds)")
    add("--validation-fold", type=int, default=0, choices=range(5), help="0 for the claim, 1-4 for tuning")
    add("--validation-cases", type=int, default=None, help="validate on the first N cases only (default: all)")
    add("--pretrain-share", type=float, default=0.3, help="share of the budget that umit_shared spends on pre-training")
    add("--planner", default="UMITPlanner", help="UMITPlanner, UMITPlannerS, ...")
    add("--replan", action="store_true", help="plan and preprocess with the UMIT planner again")
    add("--set", action="append", type=setting, default=[], metavar="KEY=VALUE",
        help="value of the plans' umit block, e.g. finetune.learning_rate=0.002; for tuning, with --tag")  # fmt: skip
    add("--tag", default="", help="kept in the key of the result, to tell tuning runs apart")
    add("--seed", type=int, default=1)
    add("--work", default=None, help="scratch folder (default: $UMIT_BENCH_WORK or benchmarks/work)")
    options = options_parser.parse_args(arguments)
    if options.set and not options.tag:
        options_parser.error("--set changes the plans' values: name the runs with --tag")
    if options.minutes is None:
        options.minutes = 8 / 60 if options.quick else 20.0

    results = Results("hippocampus_equal_time", CLAIM, options.results)
    mode = "quick" if options.quick else "full"
    prefix = f"{mode}/fold{options.validation_fold}/{options.minutes:.3g}min/seed{options.seed}/"
    todo = []
    for arm in options.arm or ARMS:
        key = prefix + arm + (f"+{options.tag}" if options.tag and arm not in STOCK else "")
        if results.get(key) is None or options.again:
            todo.append((arm, key))
    if todo:
        bench = Bench(options)
        bench.prepare([arm for arm, _ in todo])
        for arm, key in todo:
            say(f"{key} ...")
            results.put(key, bench.arm(arm, key))
    say(report(results.runs, prefix))
    say(f"One seed, one run an arm, {options.threads} cores, {options.minutes:.3g} minutes of training wall time each.")
    say(f"Results: {results.path.name} in the results folder")


if __name__ == "__main__":
    main()
