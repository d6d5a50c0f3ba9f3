"""Dice after the same training wall time: stock nnU-Net, its residual U-Net, Primus-S, UMIT scratch and pre-trained.

Every arm gets ``--minutes`` of training wall time on ``--threads`` (2) cores, in a process of its own, on one fold of
the grouped split, and is validated by nnU-Net itself (sliding window, mirroring, summary.json). Schedules are fitted
to the budget: see budgeted_training.py for what the clock counts. Tasks and minutes: hippocampus 20, ACDC 30. Arms:

- ``nnunet``       nnUNetTrainer on nnU-Net's default plans, 3d_fullres;
- ``resenc_m``     nnUNetTrainer on nnU-Net's plans for the residual encoder, size M;
- ``primus_s``     nnUNet_Primus_S_Trainer on the default plans, their patch rounded up to whole tokens of 8 voxels: it
  refuses others, ACDC's 14 slices among them;
- ``umit_scratch`` UMITTrainer on UMITPlans; three seeds on the hippocampus;
- ``umit_shared``  UMITPretrainTrainer on the training images of the fold for ``--pretrain-share`` (0.3) of the budget,
  then UMITTrainer from its checkpoint for the rest.

Dice against minutes comes from the weights that each training had at a quarter, half and three quarters of its budget,
and at its end: one pass without mirroring each, outside the clock, on at most ``CURVE_CASES`` validation cases.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import (
    DATASET,
    Results,
    add_place,
    budget,
    parse_with_tuning,
    parser,
    provenance,
    say,
    table,
    tagged,
    umit_values,
    unusual,
)
from benchmarks.equal_time import CONFIGURATION, STOCK_PLANS, Bench, alone_in, totals

CLAIM = "mean foreground Dice on a grouped validation fold after equal training wall time on equal cores"
SHARES = (0.25, 0.5, 0.75)  # of the budget, where weights are kept for the curve
CURVE_CASES = 12


@dataclass(frozen=True)
class Task:
    """A dataset, its budget, and how many seeds an arm has (arms that are not named are not run unasked)."""

    dataset: str
    minutes: float
    seeds: Mapping[str, int]


TASKS = {
    "hippocampus": Task(
        DATASET, 20.0, {"umit_scratch": 3, "nnunet": 1, "resenc_m": 1, "primus_s": 1, "umit_shared": 1}
    ),
    "acdc": Task("Dataset027_ACDC", 30.0, {"umit_scratch": 1, "nnunet": 1, "primus_s": 1}),
}
STOCK = {
    "nnunet": ("nnUNetTrainer", STOCK_PLANS),
    "resenc_m": ("nnUNetTrainer", "nnUNetResEncUNetMPlans"),
    "primus_s": ("nnUNet_Primus_S_Trainer", STOCK_PLANS),
}
IN_NO_KEY = ("planner", "threads", "pretrain_share", "validation_cases", "device")  # options that a key does not tell
ARMS = (*STOCK, "umit_scratch", "umit_shared")


def plans_of(arm: str, options: argparse.Namespace) -> str:
    """Name of the plans an arm is trained with."""
    return STOCK[arm][1] if arm in STOCK else options.planner.replace("Planner", "Plans", 1)


def run_arm(bench: Bench, arm: str, key: str, minutes: float) -> dict[str, Any]:
    """Run one arm; returns its result."""
    options, plans = bench.options, plans_of(arm, bench.options)
    seconds = minutes * 60
    folder = bench.run_folder(key)
    started = time.perf_counter()
    keep = [] if options.quick or options.no_curve else [share * seconds for share in SHARES]
    judged: dict[str, Any] = {"validate": True, "keep_at_s": keep, "curve_cases": CURVE_CASES if keep else 0}
    if arm in STOCK:
        stages = [bench.stage(folder, "stock", STOCK[arm][0], plans, seconds, **judged)]
    elif arm == "umit_scratch":
        stages = [bench.stage(folder, "finetune", "UMITTrainer", plans, seconds, **judged)]
    else:
        share = options.pretrain_share
        first = bench.stage(folder, "pretrain", "UMITPretrainTrainer", plans, share * seconds)
        judged["keep_at_s"] = [each - share * seconds for each in keep if each > share * seconds]
        second = bench.stage(
            folder, "finetune", "UMITTrainer", plans, (1 - share) * seconds,
            pretrained_weights=first["checkpoint"], **judged,
        )  # fmt: skip
        stages = [first, second]
    return {
        "arm": arm,
        "dataset": bench.dataset,
        "minutes": minutes,
        "fold": bench.fold,
        "seed": bench.seed,
        "cores": options.threads,
        "umit_values": umit_values(options) if arm not in STOCK else {},
        **totals(stages),
        "everything_s": time.perf_counter() - started,
        **provenance(),
    }


# ------------------------------------------------------------------------------------------------------- report
def gathered(runs: Mapping[str, Any], prefix: str) -> dict[str, list[Any]]:
    """Finished runs by arm (with its tag), one a seed; keys are ``<prefix>seed<S>/<arm>``."""
    found: dict[str, list[Any]] = {}
    for key, run in sorted(runs.items()):
        if key.startswith(prefix + "seed"):
            found.setdefault(key.split("/")[-1], []).append(run)
    return found


def report(runs: Mapping[str, Any], prefix: str) -> str:
    """Table of the finished arms whose key starts with ``prefix``: a line a seed, and the mean where there are more."""
    rows: list[list[object]] = []
    for arm, found in gathered(runs, prefix).items():
        for run in found:
            classes = " / ".join(f"{dice:.4f}" for dice in run["dice"]["per_class"].values())
            steps = " + ".join(str(stage["iterations"]) for stage in run["stages"])
            batch = " + ".join(str(stage["batch_size"]) for stage in run["stages"])
            times = [round(run["train_wall_s"]), round(run["train_cpu_s"])]
            rows.append(
                [arm, run["seed"], steps, batch, *times, f"{run['dice']['mean']:.4f}", classes, run["dice"]["cases"]]
            )
        if len(found) > 1:
            mean = statistics.fmean(run["dice"]["mean"] for run in found)
            rows.append([arm, f"mean of {len(found)}", None, None, None, None, f"{mean:.4f}", None, None])
    headers = ["arm", "seed", "iterations", "batch", "wall s", "CPU s", "Dice", "Dice of each class", "cases"]
    return table(headers, rows)


def curve_of(run: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Minutes of training, those of a pre-training included, and Dice of one run."""
    before = sum(stage["wall_s"] for stage in run["stages"][:-1])
    return [((before + each["wall_s"]) / 60, each["dice"]["mean"]) for each in run["stages"][-1].get("curve", [])]


def picture_name(task: str, minutes: float, quick: bool = False) -> str:
    """Of the plot of one budget: another budget than the task's own is named."""
    own = "" if minutes == TASKS[task].minutes else f"_{minutes:.3g}min"
    return f"accuracy_{task}" + ("_quick" if quick else own)


def plot(runs: Mapping[str, Any], prefix: str, file: Path) -> bool:
    """Dice against minutes, a line a run; returns whether there was a curve to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    palette = ("#56B4E9", "#009E73", "#E69F00", "#0072B2", "#D55E00")
    colours = dict(zip(ARMS, palette, strict=True))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    cases = 0
    for arm, found in gathered(runs, prefix).items():
        for index, run in enumerate(found):
            points = curve_of(run)
            if points and arm in colours:
                label = arm.replace("_", " ") if index == 0 else None
                axes.plot(*zip(*points, strict=True), "o-", color=colours[arm], label=label, markersize=4)
                cases = run["stages"][-1]["curve"][0]["dice"]["cases"]
    if cases:
        axes.set_xlabel("minutes of training")
        axes.set_ylabel(f"mean Dice, {cases} cases, no mirroring")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return bool(cases)


# --------------------------------------------------------------------------------------------------------- runs
def seeds_of(options: argparse.Namespace, task: Task) -> list[tuple[int, str]]:
    """Which seeds of which arms to run, all arms with seed 1 first."""
    arms = options.arm or list(task.seeds)
    seeds = {arm: options.seed or range(1, (1 if options.quick else task.seeds.get(arm, 1)) + 1) for arm in arms}
    return sorted(((seed, arm) for arm in arms for seed in seeds[arm]), key=lambda each: each[0])


def main(arguments: list[str] | None = None) -> None:
    """Run the arms that are not done yet, then print the table of all."""
    options_parser = parser(__doc__)
    add = options_parser.add_argument
    add("--task", choices=list(TASKS), default="hippocampus", help="default: hippocampus")
    add("--arm", action="append", choices=ARMS, help="run this arm only (may be repeated; default: those of the task)")
    add("--minutes", type=float, default=None, help="training wall time of each arm (default 20 or 30; quick: 8 s)")
    add("--validation-cases", type=int, default=None, help="validate on the first N cases only (default: all)")
    add("--no-curve", action="store_true", help="keep no weights on the way")
    add("--pretrain-share", type=float, default=0.3, help="share of the budget that umit_shared spends on pre-training")
    add("--planner", default="UMITPlanner", help="UMITPlanner, UMITPlannerS, ...")
    add("--replan", action="store_true", help="plan and preprocess with the UMIT planner again")
    add("--seed", type=int, action="append", help="this seed only (may be repeated; default: 1 to 3 for umit_scratch)")
    add_place(options_parser)
    options = parse_with_tuning(options_parser, arguments)
    task = TASKS[options.task]
    minutes = budget(options.minutes, options.quick, task.minutes)

    results = Results.of(options, "accuracy", CLAIM, unusual(options_parser, options, *IN_NO_KEY))
    mode = "quick" if options.quick else "full"
    prefix = f"{mode}/{options.task}/fold{options.validation_fold}/{minutes:.3g}min/"
    todo = []
    for seed, arm in seeds_of(options, task):
        key = f"{prefix}seed{seed}/{arm}{tagged(options) if arm not in STOCK else ''}"
        if results.left(key, values={} if arm in STOCK else umit_values(options)):
            todo.append((seed, arm, key))
    settings = {name: getattr(options, name) for name in ("quick", "threads", "set", "pretrain_share", "planner")}
    benches = {
        seed: Bench(options, dataset=task.dataset, seed=seed, settings=settings | {"minutes": minutes}, runs="accuracy")
        for seed in dict.fromkeys(seed for seed, _, _ in todo)
    }
    if todo:
        with alone_in(benches[todo[0][0]].work):
            wanted = {plans_of(arm, options): [CONFIGURATION] for _, arm, _ in sorted(todo)}
            benches[todo[0][0]].prepare(wanted)
            for seed, arm, key in todo:
                say(f"{key} ...")
                results.put(key, run_arm(benches[seed], arm, key, minutes))
    say(report(results.runs, prefix))
    if options.validation_fold == 0:
        plot(results.runs, prefix, results.path.with_name(f"{picture_name(options.task, minutes, options.quick)}.png"))
    say(f"{options.threads} cores, {minutes:.3g} minutes of training wall time each.")
    say(f"Results: {results.path.name} in the results folder")


if __name__ == "__main__":
    main()
