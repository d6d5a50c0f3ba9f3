"""Scratch, masked autoencoder, soft tokens: what does pre-training buy at equal pre-training time?

Each method has ``--minutes`` (20) of wall time on all training images of grouped fold 0 (to tune: another
``--validation-fold``, with ``--set`` and ``--tag``), without labels; soft tokens spend ``--tokenizer-share`` (0.4) of
it on their tokenizer. Then UMITTrainer learns for ``--finetune-minutes`` (5):
hippocampus and ACDC with ten labelled cases, hippocampus with all. One pre-training a method and data set, seed 1;
fine-tunings with seeds 1 and 2. ``scratch+`` has the time of pre-training and fine-tuning together.

Dice is that of nnU-Net's own validation on the fold's validation cases (at most 40).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Results,
    budget,
    parse_with_tuning,
    provenance,
    say,
    table,
    tagged,
    training_parser,
    umit_values,
    unusual,
    work_folder,
)
from benchmarks.equal_time import alone_in, totals
from benchmarks.few_labels import PLANS, FewLabels, gathered, mean_and_seeds

CLAIM = "what masked pre-training, of voxels or of soft tokens, adds to a short fine-tuning"
MINUTES, FINETUNE_MINUTES = 20.0, 5.0
METHODS = {"mae": "UMITPretrainTrainer", "soft_tokens": "UMITSoftTokenPretrainTrainer"}
ARMS = ("scratch", *METHODS, "scratch+")
TASKS: tuple[tuple[str, int], ...] = (
    ("Dataset004_Hippocampus", 10),
    ("Dataset004_Hippocampus", 0),  # 0: all of the fold's
    ("Dataset027_ACDC", 10),
)


class Methods(FewLabels):
    """The trainings of one invocation."""

    def __init__(self, options: argparse.Namespace, results: Results, minutes: float, tuning: float) -> None:
        spent = f"{minutes:.3g}min+{tuning:.3g}min"
        super().__init__(options, results, "pretraining_methods", spent, {"share": options.tokenizer_share})
        self.minutes, self.tuning = minutes, tuning

    def own_values(self) -> dict[str, Any]:
        """What is set, if a pre-training has a part in it; else nothing: all fine-tunings of a method share one."""
        shared = all(key.startswith("finetune.") for key, _ in self.options.set)
        return {} if shared else dict(self.options.set)

    def named(self, method: str) -> str:
        """The method, with the tag of a pre-training that has values of its own."""
        return method + tagged(self.options) if self.own_values() else method

    def pretrain(self, dataset: str, method: str) -> str:
        """Pre-train if that is not done; returns the key."""
        key = f"{self.prefix}{dataset}/{self.named(method)}"
        asked = umit_values(self.options) if self.own_values() else {}
        if not self.results.left(key, values=asked):
            return key
        say(f"{key} ...")
        bench = self.bench(dataset, 1, self.minutes)
        self.split(bench, 0)
        folder, started, seconds = bench.run_folder(key), time.perf_counter(), self.minutes * 60
        stages, values = [], {}
        if method == "soft_tokens":
            share = self.options.tokenizer_share
            stages.append(
                bench.stage(folder, "tokenizer", "UMITTokenizerTrainer", PLANS, share * seconds, validate=True)
            )
            values, seconds = {"pretrain.tokenizer": stages[0]["checkpoint"]}, (1 - share) * seconds
        stages.append(bench.stage(folder, "pretrain", METHODS[method], PLANS, seconds, values=values, validate=True))
        described = {"dataset": dataset, "method": self.named(method), "minutes": self.minutes}
        described |= {"cores": self.options.threads, "umit_values": asked}
        described |= {"figures": [stage["figures"] for stage in stages], **totals(stages)}
        self.results.put(key, described | {"everything_s": time.perf_counter() - started, **provenance()})
        return key

    def compare(self, dataset: str, labelled: int, seed: int, arm: str) -> None:
        """Fine-tune one arm if that is not done, after its pre-training."""
        key = f"{self.prefix}{dataset}/{labelled or 'all'}/seed{seed}/{arm}{tagged(self.options)}"
        asked = umit_values(self.options)
        if self.results.left(key, values=asked):
            weights = self.checkpoint(dataset, arm) if arm in METHODS else None
            minutes = self.tuning + (self.minutes if arm == "scratch+" else 0.0)
            self.finetune(key, dataset, labelled, seed, minutes, weights, arm=arm, umit_values=asked)

    def checkpoint(self, dataset: str, method: str) -> str:
        """Final checkpoint of a pre-training."""
        bench = self.bench(dataset, 1, self.minutes)
        folder = bench.folder_of(self.pretrain(dataset, method))
        return str(bench.model(folder, METHODS[method], PLANS) / f"fold_{self.fold}" / "checkpoint_final.pth")


def report(runs: Mapping[str, Any], prefix: str) -> str:
    """Mean Dice and the seeds, by task and arm; arms with a tag come last."""
    found = gathered(runs, prefix)
    if not found:
        return learned(runs, prefix)
    tuned = sorted({arm for arms in found.values() for arm in arms} - set(ARMS))
    names = [*ARMS, *tuned]
    rows = [[task, *(mean_and_seeds(arms.get(arm, [])) for arm in names)] for task, arms in found.items()]
    return "\n\n".join([table(["data set / labelled cases", *names], rows), learned(runs, prefix)]).strip()


def learned(runs: Mapping[str, Any], prefix: str) -> str:
    """What the pre-trainings know of unseen images; nothing where none is stored."""
    rows = []
    for key, run in sorted(runs.items()):
        if not key.startswith(prefix) or "method" not in run:
            continue
        pooled: dict[str, float] = {}
        for stage in run["stages"]:
            pooled |= stage.get("figures", {}).get("pooled", {})
        shares = ("variance_explained", "information_explained")
        shown = [None if name not in pooled else f"{100 * pooled[name]:.1f} %" for name in shares]
        losses = [pooled.get(name) for name in ("masked_loss", "interpolation_loss", "psnr", "perplexity")]
        steps = " + ".join(str(stage["iterations"]) for stage in run["stages"])
        numbers = [None if value is None else f"{value:.3f}" for value in losses]
        rows.append([run["dataset"], run["method"], steps, *numbers[:2], shown[0], *numbers[2:], shown[1]])
    heads = ["pre-training", "method", "steps", "masked loss", "of interpolation", "variance explained"]
    return table([*heads, "PSNR dB", "perplexity", "information explained"], rows) if rows else ""


def plot(runs: Mapping[str, Any], prefix: str, file: Path) -> None:
    """Dice of every seed as a dot, the mean as a dash; a panel a task, each with its own scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = gathered(runs, prefix)
    if not tasks:
        return
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(9, 3.5), layout="constrained", squeeze=False)
    for axes, (task, arms) in zip(panels[0], tasks.items(), strict=True):
        for index, (arm, colour) in enumerate(zip(ARMS, ("#777777", "#0072B2", "#D55E00", "#222222"), strict=True)):
            dice = arms.get(arm, [])
            if dice:
                axes.plot([index - 0.3, index + 0.3], [statistics.fmean(dice)] * 2, color=colour, linewidth=3)
                axes.plot([index] * len(dice), dice, "o", color=colour, markersize=6, markeredgecolor="white")
        axes.set_xticks(range(len(ARMS)), [arm.replace("_", "\n") for arm in ARMS])
        axes.set_xlim(-0.6, len(ARMS) - 0.4)
        axes.margins(y=0.2)
        axes.set_title(task.replace("/", "\n") + " labelled", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("mean Dice; axes do not begin at 0")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def asked(options: argparse.Namespace) -> list[tuple[str, int]]:
    """The data sets and numbers of labelled cases that the command line asks for."""
    tasks = [task for task in TASKS if not options.dataset or int(task[0][7:10]) in options.dataset]
    if options.labelled is not None:
        tasks = [(dataset, options.labelled) for dataset in dict.fromkeys(dataset for dataset, _ in tasks)]
    return tasks[:1] if options.quick else tasks


def main(arguments: list[str] | None = None) -> None:
    """Run what is not done yet, then print the table of all and draw the picture."""
    options_parser = training_parser(__doc__, MINUTES)
    add = options_parser.add_argument
    add("--finetune-minutes", type=float, default=None, help=f"of each fine-tuning (default {FINETUNE_MINUTES:g})")
    add("--tokenizer-share", type=float, default=0.4, help="share of the soft tokens' time that the tokenizer has")
    add("--seed", type=int, action="append", help="fine-tune with this seed only (may be repeated; default: 1 and 2)")
    add("--arm", action="append", choices=ARMS, help="run this arm only (may be repeated; default: all)")
    numbers = sorted({int(dataset[7:10]) for dataset, _ in TASKS})
    add("--dataset", type=int, action="append", choices=numbers, help="this data set only (may be repeated)")
    add("--labelled", type=int, metavar="N", help="fine-tune with N labelled cases only, 0: all (default: see above)")
    options = parse_with_tuning(options_parser, arguments)
    minutes = budget(options.minutes, options.quick, MINUTES)
    tuning = budget(options.finetune_minutes, options.quick, FINETUNE_MINUTES)
    settings = unusual(options_parser, options, "threads", "tokenizer_share", "device")
    results = Results.of(options, "pretraining_methods", CLAIM, settings)
    methods = Methods(options, results, minutes, tuning)
    with alone_in(work_folder(options.work)):
        for dataset, labelled in asked(options):
            for seed in options.seed or ([1] if options.quick else [1, 2]):
                for arm in options.arm or ARMS:
                    methods.compare(dataset, labelled, seed, arm)
    picture = results.path.with_name(results.path.stem + ("_quick" if options.quick else "") + ".png")
    if methods.fold == 0:
        plot(results.runs, methods.prefix, picture)
    say(report(results.runs, methods.prefix))
    say(
        f"{options.threads} cores; one pre-training a method and data set, {minutes:.3g} minutes, on the fold's images."
    )
    say(f"Results: {results.path.name} and {picture.name} in the results folder")


if __name__ == "__main__":
    main()
