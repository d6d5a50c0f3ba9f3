"""What UMITPlanner decides for every dataset, and whether the memory it predicts is the memory a step takes.

Every dataset in ``$UMIT_DATA`` is planned with ``nnUNetv2_plan_and_preprocess -pl UMITPlanner --no_pp``. Then two real
fine-tuning steps of five of the configurations run on the CPU (fp32, one thread, nnU-Net's loss, AdamW), each in a
process of its own, and the growth of its peak memory is held against the prediction (plan_memory.py; Linux).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import Results, data_root, parser, provenance, say, table, work_folder
from benchmarks.plan_memory import measure_training_memory
from nnunet_umit.cli.stock import find_command, stock_environment
from nnunet_umit.plans.memory import GB, predict_training_memory
from nnunet_umit.plans.report import COLUMNS, CPU_COLUMN, heads_and_channels, table_rows

CLAIM = "the planner's memory model agrees with real training steps"
DATASETS, QUICK_DATASETS = (4, 27, 120, 121, 122, 123, 124, 125), (4,)
MEASURED = ((4, "3d_fullres"), (4, "2d"), (27, "3d_fullres"), (122, "3d_fullres"), (124, "2d"))


def plan(name: str, work: Path) -> Path:
    """Plan one dataset of the data folder with the stock command; returns its plans file."""
    raw, preprocessed = work / "nnUNet_raw", work / "nnUNet_preprocessed"
    raw.mkdir(parents=True, exist_ok=True)
    if not (raw / name).exists():
        (raw / name).symlink_to(data_root() / name)
    command = [str(find_command("nnUNetv2_plan_and_preprocess")), "-d", name[7:10], "-pl", "UMITPlanner", "--no_pp"]
    environment = stock_environment(raw, preprocessed, work / "nnUNet_results")
    done = subprocess.run([*command, "-npfp", "2"], env=environment, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return preprocessed / name / "UMITPlans.json"


def described(file: Path) -> dict[str, Any]:
    """The rows of the table for one plans file, and the reasons that it gives."""
    plans = json.loads(file.read_text(encoding="utf-8"))
    rows = [list(row[1:]) for row in table_rows(plans, *heads_and_channels(file), with_cpu=True)]
    return {"rows": rows, "why": {name: each["umit"]["why"] for name, each in plans["configurations"].items()}}


def measured(file: Path, configuration: str) -> dict[str, Any]:
    """Predicted and measured bytes of a step with the batch of the plans."""
    classes, channels = heads_and_channels(file)
    planned = json.loads(file.read_text(encoding="utf-8"))["configurations"][configuration]
    arch, patch, batch = planned["architecture"]["arch_kwargs"], planned["patch_size"], planned["batch_size"]
    predicted = predict_training_memory(arch, patch, channels, classes, "full").total(batch)
    found = measure_training_memory(arch, patch, channels, classes, batch)
    return {"batch": batch, "predicted_bytes": predicted, "measured_bytes": found}


def report_plans(runs: Mapping[str, Any], mode: str) -> str:
    """One row a configuration."""
    rows = [
        [key.removeprefix(f"{mode}/plans/Dataset"), *row]
        for key, run in sorted(runs.items())
        if key.startswith(f"{mode}/plans/")
        for row in run["rows"]
    ]
    return table([*COLUMNS, CPU_COLUMN], rows) if rows else ""


def report_memory(runs: Mapping[str, Any], mode: str) -> str:
    """Prediction against measurement."""
    rows = []
    for key, run in sorted(runs.items()):
        if key.startswith(f"{mode}/memory/"):
            dataset, configuration = key.removeprefix(f"{mode}/memory/Dataset").split("/")
            predicted, found = run["predicted_bytes"], run["measured_bytes"]
            sizes = [f"{value / GB:.2f} GB" for value in (predicted, found)]
            rows.append([dataset, configuration, run["batch"], *sizes, f"{predicted / found:.0%}"])
    heads = ["dataset", "configuration", "batch", "predicted", "measured", "predicted / measured"]
    return table(heads, rows) if rows else ""


def main(arguments: list[str] | None = None) -> None:
    """Plan and measure what is not stored yet, and print both tables."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--work", default=None, help="scratch folder")
    options = options_parser.parse_args(arguments)
    results, mode = Results.of(options, "planning", CLAIM), "quick" if options.quick else "full"
    work = work_folder(options.work) / "planning"
    for number in QUICK_DATASETS if options.quick else DATASETS:
        folders = sorted(data_root().glob(f"Dataset{number:03d}_*"))
        if not folders:
            raise FileNotFoundError(f"Dataset{number:03d} is not in the data folder; set UMIT_DATA to one that has it")
        name = folders[0].name
        keys = {each: f"{mode}/memory/{name}/{each}" for dataset, each in MEASURED if dataset == number}
        left = [key for key in (f"{mode}/plans/{name}", *keys.values()) if results.left(key)]
        if not left:
            continue
        say(f"{name} ...")
        file = plan(name, work)
        results.put(f"{mode}/plans/{name}", described(file) | provenance())
        for configuration, key in keys.items():
            results.put(key, measured(file, configuration) | provenance())
    say(report_plans(results.runs, mode))
    say(report_memory(results.runs, mode))


if __name__ == "__main__":
    main()
