"""What a plans file decided, as a table, and which commands come next.

``python -m nnunet_umit.plans.report PLANS.json ...`` prints the table as Markdown for one or several UMIT plans files.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_umit.plans.memory import GB, predict_training_memory
from nnunet_umit.plans.sizing import count_tokens
from nnunet_umit.spacing import Anisotropy

COLUMNS = (
    "dataset",
    "configuration",
    "spacing (mm)",
    "level",
    "size",
    "token",
    "patch",
    "tokens",
    "batch",
    "parameters",
    "GPU memory (fp16)",
)
CPU_COLUMN = "CPU memory (fp32)"


def segmentation_heads(dataset_json: Mapping[str, Any]) -> int:
    """Output channels of the network: classes with background, or regions; the ignore label has none."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    manager = LabelManager(dataset_json["labels"], regions_class_order=dataset_json.get("regions_class_order"))
    return int(manager.num_segmentation_heads)


def image_channels(dataset_json: Mapping[str, Any]) -> int:
    """Input channels of the network ("modality" is the name in old dataset.json files)."""
    return len(dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"])


def heads_and_channels(plans_file: str | os.PathLike[str]) -> tuple[int, int]:
    """(segmentation heads, image channels) from the dataset.json that lies beside a plans file."""
    path = Path(plans_file).with_name("dataset.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it belongs beside the plans, so plan the dataset again")
    dataset_json = json.loads(path.read_text(encoding="utf-8"))
    return segmentation_heads(dataset_json), image_channels(dataset_json)


def table_rows(plans: Mapping[str, Any], heads: int, channels: int, with_cpu: bool = False) -> list[tuple[str, ...]]:
    """One row per configuration that inherits nothing of this, in the order of `COLUMNS`, then `CPU_COLUMN`."""
    rows: list[tuple[str, ...]] = []
    for name, configuration in plans["configurations"].items():
        if not {"umit", "architecture", "patch_size", "batch_size"} <= set(configuration):
            continue  # another planner's, or inherited, in part at least
        arch, patch = configuration["architecture"]["arch_kwargs"], tuple(configuration["patch_size"])
        anisotropy = Anisotropy.from_spacing(arch["spacing"])
        token, batch = anisotropy.token(arch["token_size"])[3 - len(patch) :], configuration["batch_size"]
        memory = predict_training_memory(arch, patch, channels, heads, "mixed")
        rows.append(
            (
                plans["dataset_name"],
                name,
                _join(f"{value:.3g}" for value in arch["spacing"]),
                str(anisotropy.level),
                configuration["umit"]["size"],
                _join(token),
                _join(patch),
                str(count_tokens(patch, token)),
                str(batch),
                f"{memory.parameters / 1e6:.1f} M",
                f"{memory.total(batch) / GB:.1f} GB",
            )
        )
        if with_cpu:
            memory = predict_training_memory(arch, patch, channels, heads, "full")
            rows[-1] += (f"{memory.total(batch) / GB:.1f} GB",)
    return rows


def print_table(rows: Sequence[tuple[str, ...]], whys: Mapping[str, str]) -> None:
    """A rich table without the dataset column (one dataset), and the reason for each network size."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log file has no width; 80 would break the columns
    table = Table(title=rows[0][0] if rows else None)
    for column in COLUMNS[1:]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row[1:])
    console.print(table)
    for configuration, why in whys.items():
        console.print(f"{configuration}: {why}", highlight=False, markup=False, soft_wrap=True)


def next_commands(dataset_name: str, plans_name: str, configurations: Sequence[str]) -> list[str]:
    """The stock commands that follow planning, for the first configuration, ready to be copied."""
    number, configuration = int(dataset_name[7:10]), configurations[0]
    model = f"UMITPretrainTrainer__{plans_name}__{configuration}"
    results = os.environ.get("nnUNet_results") or "$nnUNet_results"
    weights = "/".join((results, dataset_name, model, "fold_all", "checkpoint_final.pth"))
    train, chosen = f"nnUNetv2_train {number} {configuration}", f"-p {plans_name}"
    predict = f"nnUNetv2_predict -d {number} -c {configuration} -f 0"
    preprocess = f"nnUNetv2_preprocess -d {number} -plans_name {plans_name} -c"
    resampled = " ".join(name for name in configurations if name != "3d_native")
    return [
        "# preprocess (nnUNetv2_plan_and_preprocess does this for you)",
        f"{preprocess} {resampled}",
        "# for training at each image's own spacing: preprocess this as well, and train it instead of the other",
        f"{preprocess} 3d_native",
        "# pre-train on all images, without labels",
        f"{train} all -tr UMITPretrainTrainer {chosen}",
        "# fine-tune (leave the last option away to train from scratch)",
        f"{train} 0 -tr UMITTrainer {chosen} -pretrained_weights {_quoted(weights)}",
        "# predict",
        f"{predict} -tr UMITTrainer {chosen} -i INPUT_FOLDER -o OUTPUT_FOLDER",
    ]


def _quoted(path: str) -> str:
    return f'"{path}"' if " " in path else path


def _join(values: Any) -> str:
    return " x ".join(map(str, values))


def main() -> None:
    """Print a Markdown table for one or several plans files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("plans", nargs="+", help="UMITPlans.json files, each beside its dataset.json")
    print("| " + " | ".join((*COLUMNS, CPU_COLUMN)) + " |")
    print("|" + " --- |" * (len(COLUMNS) + 1))
    for path in parser.parse_args().plans:
        plans = json.loads(Path(path).read_text(encoding="utf-8"))
        for row in table_rows(plans, *heads_and_channels(path), with_cpu=True):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
