"""Put the measured figures into README and docs: every table there that holds one is made here, from the JSON.

    python -m benchmarks.report            # rewrite the tables
    python -m benchmarks.report --check    # fail where a page differs from the results

A page marks a table with ``<!-- results: NAME -->`` and ``<!-- end of results -->``; NAME is a key of ``BLOCKS``. What
has not been measured is left out, so a page never shows a figure that no file holds.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import (
    accuracy,
    arithmetic,
    corpus_transfer,
    demo,
    finetune_step,
    gpu_step,
    label_efficiency,
    mae_step,
    native_spacing,
    planning,
    predict,
    pretraining_methods,
    residual_errors,
    scaling,
    spacing_robustness,
    tokenizer,
)
from benchmarks.common import REPOSITORY, Results, say
from benchmarks.few_labels import by_seed

PAGES = ("README.md", "docs/gpu.md", "docs/planning.md", "docs/results.md", "docs/soft_tokens.md")
MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.S)
METHODS, LABELS = "full/fold0/20min+5min/", "full/fold0/60min+5min/"
TOKENIZER = "full/fold0/20min/seed1/soft-alone"
NOTHING = "Not measured yet."
HOUR = 60.0  # minutes


@functools.cache
def runs_of(name: str) -> Mapping[str, Any]:
    """What a benchmark has stored."""
    return Results(name, "").runs


# ---------------------------------------------------------------------------------------------------- headline
def headline() -> str:
    """The README's table: what, figure, command."""
    parts = (_accuracy_rows, _label_rows, _pretraining_rows, _native_rows, _step_rows, _prediction_rows)
    rows = [row for part in parts for row in part()]
    lines = ["| what | figure | command |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {figure} | `{command}` |" for what, figure, command in rows)])


def _accuracy_rows() -> list[tuple[str, str, str]]:
    names = {
        "umit_scratch": "UMIT from scratch",
        "umit_shared": "UMIT, 30 % of the time for masked pre-training, then fine-tuning",
        "primus_s": "stock `nnUNet_Primus_S_Trainer`",
        "resenc_m": "stock `nnUNetTrainer` on its residual plans, size M",
        "nnunet": "stock `nnUNetTrainer` on nnU-Net's default plans",
    }
    rows = []
    labels = {"hippocampus": "Hippocampus (MSD Task04)", "acdc": "ACDC"}
    own = {task: accuracy.TASKS[task].minutes for task in labels}
    for task, minutes in (("hippocampus", own["hippocampus"]), ("hippocampus", HOUR), ("acdc", own["acdc"])):
        label = labels[task]
        found = accuracy.gathered(runs_of("accuracy"), f"full/{task}/fold0/{minutes:.3g}min/")
        for arm, name in names.items():
            if arm not in found:
                continue
            dice = [run["dice"]["mean"] for run in found[arm]]
            steps = ", ".join(str(run["iterations"]) for run in found[arm])
            seeds = f"{len(dice)} seed{'s' if len(dice) > 1 else ''}"
            cases = found[arm][0]["dice"]["cases"]
            what = (
                f"{label}, grouped fold 0, {cases} cases: mean Dice after {minutes:.3g} minutes of training wall time. "
                f"{name[0].upper()}{name[1:]}, {seeds}, {steps} steps"
            )
            options = "" if task == "hippocampus" else f" --task {task}"
            if minutes != own[task]:  # asked for by name: the command that makes these runs and no others
                options += f" --minutes {minutes:.3g} --arm {arm}" + "".join(
                    f" --seed {run['seed']}" for run in found[arm]
                )
            command = f"python -m benchmarks.accuracy --full{options}"
            rows.append((what, f"{statistics.fmean(dice):.3f}", command))
    return rows


def _pretraining_rows() -> list[tuple[str, str, str]]:
    names = {
        "scratch": "from scratch",
        "mae": "after 20 minutes of masked pre-training",
        "soft_tokens": "after 20 minutes of tokenizer and soft-token pre-training",
        "scratch+": "from scratch in 25 minutes",
    }
    rows = []
    for task, arms in pretraining_methods.gathered(runs_of("pretraining_methods"), METHODS).items():
        dataset, labelled = task.split("/")
        label = f"{dataset.split('_')[1]}, {labelled} labelled cases, 5 minutes of fine-tuning: mean Dice"
        shown = [f"{name} {statistics.fmean(arms[arm]):.3f}" for arm, name in names.items() if arm in arms]
        seeds = "/".join(sorted({str(len(dice)) for dice in arms.values()}))
        rows.append((f"{label}, {seeds} seeds", "; ".join(shown), "python -m benchmarks.pretraining_methods --full"))
    return rows


def _label_rows() -> list[tuple[str, str, str]]:
    pairs = by_seed(runs_of("label_efficiency"), f"{LABELS}{label_efficiency.MAIN}/", label_efficiency.ARMS)
    if not pairs:
        return []
    scratch, pretrained = (statistics.fmean(arm) for arm in zip(*pairs, strict=True))
    what = f"Hippocampus, {label_efficiency.MAIN} labelled cases, 5 minutes of fine-tuning: mean Dice"
    shown = f"from scratch {scratch:.4f}; after 60 minutes of masked pre-training {pretrained:.4f}"
    return [(f"{what}, {len(pairs)} seeds", shown, "python -m benchmarks.label_efficiency --full")]


def _native_rows() -> list[tuple[str, str, str]]:
    runs, prefix = runs_of("native_spacing"), "full/fold0/15min/"
    samples, differences = native_spacing.samples_in(runs, prefix), native_spacing.dice_differences(runs, prefix)
    rows, command = [], "python -m benchmarks.native_spacing --full"
    if differences:
        counted = f"{len(differences)} seed{'s' if len(differences) > 1 else ''}"
        what = f"ACDC without resampling (`3d_native`) against `3d_fullres`, 15 minutes of training each, {counted}"
        seeds = " / ".join(f"{each:+.3f}" for each in differences)
        rows.append((f"{what}: difference in Dice", f"{statistics.fmean(differences):+.3f} ({seeds})", command))
    native, resampled = (samples[arm] for arm in native_spacing.ARMS)
    if native:
        ratio = native_spacing.paired_ratio(native, resampled)["wall"]["median"]
        what = f"The same, wall time of `nnUNetv2_predict` end to end, median of {len(native)} pairs"
        rows.append((what, f"{ratio:.3f} x", command))
    return rows


def _step_rows() -> list[tuple[str, str, str]]:
    rows = []
    step = runs_of("finetune_step").get("full/batch4/threads2")
    if step:
        arms, command = step["arms"], "python -m benchmarks.finetune_step --full"
        what = (
            "One fine-tuning step of the hippocampus plan against nnU-Net's PlainConvUNet, batch 4: CPU seconds, "
            f"median of {arms['UMIT']['repeats']} paired repeats"
        )
        rows.append((what, f"{arms['UMIT']['ratio']['cpu']['median']:.3f} x", command))
        rows.append(
            ("The same, Primus-S against PlainConvUNet", f"{arms['Primus-S']['ratio']['cpu']['median']:.3f} x", command)
        )
    for tokens in mae_step.IMAGES:
        run = runs_of("mae_step").get(f"full/tokens{tokens}/threads2")
        if run:
            command = "python -m benchmarks.mae_step --full"
            if "--repeats" in run["options"]:
                command += f" --tokens {tokens} --repeats {run['arms'][mae_step.OURS]['repeats']}"
            for arm, name in (
                (mae_step.OURS, "a decoder as large as MONAI's"),
                ("UMIT, narrow decoder", "our default, narrow decoder"),
            ):
                what = (
                    f"One masked-autoencoder step against MONAI's, equal encoder, {tokens} tokens, "
                    f"mask ratio {run['mask_ratio']}, fp32; {name}: CPU seconds"
                )
                rows.append((what, f"{run['arms'][arm]['ratio']['cpu']['median']:.3f} x", command))
    return rows


def _prediction_rows() -> list[tuple[str, str, str]]:
    rows = []
    for dataset, cases in predict.CASES.items():
        run = runs_of("predict").get(f"full/{dataset}/threads2")
        if run:
            what = f"`nnUNetv2_predict` end to end, {cases} cases of {dataset}, against PlainConvUNet: wall time"
            ratio = run["arms"]["UMIT"]["ratio"]["wall"]["median"]
            rows.append((what, f"{ratio:.3f} x", "python -m benchmarks.predict --full"))
    return rows


# -------------------------------------------------------------------------------------------------- whole tables
def _accuracy(task: str, minutes: float | None = None) -> str:
    minutes = minutes or accuracy.TASKS[task].minutes
    table = _other_accuracy(f"full/{task}/fold0/{minutes:.3g}min/")
    return table and table + _picture(accuracy.picture_name(task, minutes), f"Dice against minutes, {task}")


def _other_accuracy(prefix: str) -> str:
    return accuracy.report(runs_of("accuracy"), prefix) if accuracy.gathered(runs_of("accuracy"), prefix) else ""


def _several(name: str, module: Any, keys: list[str]) -> str:
    return "\n\n".join(_fenced(module.report(runs_of(name)[key])) for key in keys if key in runs_of(name))


def _fenced(text: str) -> str:
    """Blank lines around the tables of a report that was made for a terminal."""
    return re.sub(r"(?<=[^|\n])\n(?=\|)|(?<=\|)\n(?=[^|\n])", "\n\n", text)


def _robustness() -> str:
    scored = spacing_robustness.scored_in(runs_of("spacing_robustness"), "full/fold0/15min/", 1)
    if len(scored) < 2:
        return ""
    return spacing_robustness.report(scored) + _picture("spacing_robustness", "Dice against slice thickness")


def _picture(name: str, what: str) -> str:
    """The plot that a benchmark left beside its results, as a page in docs shows it."""
    file = Path("benchmarks") / "results" / f"{name}.png"
    return f"\n\n![{what}](../{file.as_posix()})" if (REPOSITORY / file).is_file() else ""


def _corpus() -> str:
    return corpus_transfer.report(runs_of("corpus_transfer"), "full/corpus/30min", "full/30min+4min/")


def _gpu_steps() -> str:
    runs = {key: run for key, run in runs_of("gpu_step").items() if key.startswith("full/") and run["device"] != "cpu"}
    return gpu_step.report(runs) if runs else ""


def _prediction() -> str:
    keys = [f"full/{dataset}/threads2" for dataset in predict.CASES]
    start = runs_of("predict").get("full/start")
    return _several("predict", predict, keys) + ("\n\n" + predict.report_starts(start) if start else "")


BLOCKS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "demo": lambda: _one("demo", demo),
    "plans": lambda: planning.report_plans(runs_of("planning"), "full"),
    "plan_memory": lambda: planning.report_memory(runs_of("planning"), "full"),
    "arithmetic": lambda: _one("arithmetic", arithmetic),
    "accuracy_hippocampus": lambda: _accuracy("hippocampus"),
    "accuracy_hour": lambda: _accuracy("hippocampus", HOUR),
    "residual_errors": lambda: _fenced(_one("residual_errors", residual_errors)),
    "tuning_hippocampus": lambda: _other_accuracy("full/hippocampus/fold1/5min/"),
    "tuning_width": lambda: _other_accuracy("full/hippocampus/fold1/20min/"),
    "tuning_acdc": lambda: _other_accuracy("full/acdc/fold1/10min/"),
    "tuning_balance": lambda: _other_accuracy("full/acdc/fold1/6min/"),
    "accuracy_acdc": lambda: _accuracy("acdc"),
    "label_efficiency": lambda: _with_runs("label_efficiency", label_efficiency, LABELS),
    "pretraining_methods": lambda: _with_runs("pretraining_methods", pretraining_methods, METHODS),
    "pretraining_tuning": lambda: pretraining_methods.report(runs_of("pretraining_methods"), "full/fold1/12min+5min/"),
    "native_spacing": lambda: _with_runs("native_spacing", native_spacing, "full/fold0/15min/"),
    "spacing_robustness": _robustness,
    "corpus_transfer": _corpus,
    "tokenizer": lambda: tokenizer.report(runs_of("tokenizer"), TOKENIZER, "full/fold0/6min/"),
    "mae_step": lambda: _several("mae_step", mae_step, [f"full/tokens{n}/threads2" for n in mae_step.IMAGES]),
    "finetune_step": lambda: _several("finetune_step", finetune_step, ["full/batch4/threads2", "full/batch7/threads2"]),
    "gpu_step": _gpu_steps,
    "predict": _prediction,
    "scaling": lambda: scaling.report(runs_of("scaling"), "full"),
}


def _one(name: str, module: Any) -> str:
    return module.report(runs_of(name)["full"]) if "full" in runs_of(name) else ""


def _with_runs(name: str, module: Any, prefix: str) -> str:
    found = any(key.startswith(prefix) for key in runs_of(name))
    return module.report(runs_of(name), prefix) + _picture(name, name.replace("_", " ")) if found else ""


# -------------------------------------------------------------------------------------------------------- pages
def rendered(text: str) -> str:
    """The text of a page with its tables made anew.

    Raises:
        KeyError: a mark names no table.
    """

    def block(found: re.Match[str]) -> str:
        content = BLOCKS[found[2]]().strip() or NOTHING
        return f"{found[1]}{content}\n{found[3]}"

    return MARKED.sub(block, text)


def outdated(root: Path = REPOSITORY) -> list[str]:
    """Pages that differ from the results."""
    texts = {page: (root / page).read_text(encoding="utf-8") for page in PAGES}
    return [page for page, text in texts.items() if rendered(text) != text]


def main(arguments: list[str] | None = None) -> None:
    """Rewrite or check the pages."""
    options_parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options_parser.add_argument("--check", action="store_true", help="change nothing; fail where a page differs")
    options = options_parser.parse_args(arguments)
    differing = outdated()
    if options.check and differing:
        raise SystemExit(f"{', '.join(differing)} differ from benchmarks/results; run python -m benchmarks.report")
    for page in differing:
        file = REPOSITORY / page
        file.write_text(rendered(file.read_text(encoding="utf-8")), encoding="utf-8")
    say("written: " + (", ".join(differing) or "nothing, all pages are up to date"))


if __name__ == "__main__":
    main()
