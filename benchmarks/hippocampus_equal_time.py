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
import json
import time
from typing import Any

from benchmarks.common import Results, parser, provenance, say, table
from benchmarks.equal_time import CONFIGURATION, STOCK_PLANS, Bench, alone_in, totals

CLAIM = "mean foreground Dice on a grouped validation fold after equal training wall time on equal cores"
ARMS = ("nnunet", "primus_s", "umit_scratch", "umit_shared")
STOCK = {"nnunet": "nnUNetTrainer", "primus_s": "nnUNet_Primus_S_Trainer"}


def setting(text: str) -> tuple[str, Any]:
    """``finetune.learning_rate=0.002`` -> key and value (JSON; a bare word is a string)."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, e.g. finetune.learning_rate=0.002")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def plans_of(arm: str, options: argparse.Namespace) -> str:
    """Name of the plans an arm is trained with."""
    return STOCK_PLANS if arm in STOCK else options.planner.replace("Planner", "Plans", 1)


def run_arm(bench: Bench, arm: str, key: str) -> dict[str, Any]:
    """Run one arm; returns its result."""
    options, plans = bench.options, plans_of(arm, bench.options)
    seconds = options.minutes * 60
    folder = bench.run_folder(key)
    started = time.perf_counter()
    if arm in STOCK:
        stages = [bench.stage(folder, "stock", STOCK[arm], plans, seconds, validate=True)]
    elif arm == "umit_scratch":
        stages = [bench.stage(folder, "finetune", "UMITTrainer", plans, seconds, validate=True)]
    else:
        share = options.pretrain_share
        first = bench.stage(folder, "pretrain", "UMITPretrainTrainer", plans, share * seconds)
        second = bench.stage(
            folder, "finetune", "UMITTrainer", plans, (1 - share) * seconds,
            validate=True, pretrained_weights=first["checkpoint"],
        )  # fmt: skip
        stages = [first, second]
    return {
        "arm": arm,
        "minutes": options.minutes,
        "fold": bench.fold,
        "seed": bench.seed,
        "cores": options.threads,
        "umit_values": dict(options.set) if arm not in STOCK else {},
        **totals(stages),
        "everything_s": time.perf_counter() - started,
        **provenance(),
    }


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
        with alone_in(bench.work):
            bench.prepare({plans_of(arm, options): [CONFIGURATION] for arm, _ in sorted(todo)})
            for arm, key in todo:
                say(f"{key} ...")
                results.put(key, run_arm(bench, arm, key))
    say(report(results.runs, prefix))
    say(f"One seed, one run an arm, {options.threads} cores, {options.minutes:.3g} minutes of training wall time each.")
    say(f"Results: {results.path.name} in the results folder")


if __name__ == "__main__":
    main()
