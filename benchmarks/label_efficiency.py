"""How many labels does pre-training save? Hippocampus with 5, 10 and 40 labelled cases, pre-trained against scratch.

UMITPretrainTrainer learns all training images of grouped fold 0 for ``--minutes`` (60) of wall time, without labels.
Then UMITTrainer learns 5, 10 or 40 labelled cases for ``--finetune-minutes`` (5), with that encoder and from scratch,
seeds 1, 2 and 3; with 10 cases and seed 1 also with the encoder as it was after 10 and 30 minutes (their learning
rate had not come down yet). Dice is that of nnU-Net's own validation on the fold's validation cases (at most 40).

Claim: at 10 labelled cases pre-training is worth at least 3 Dice points, and the seeds do not overlap. The pre-training
itself must have learned: its masked loss on the validation images is below 0.8, where 1 is "learned nothing".
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import (
    DATASET,
    Results,
    budget,
    provenance,
    say,
    table,
    training_parser,
    unusual,
    verdict,
    work_folder,
)
from benchmarks.equal_time import alone_in, totals
from benchmarks.few_labels import PLANS, FewLabels, by_seed, gathered, mean_and_seeds

CLAIM = "with 10 labelled hippocampi a pre-trained encoder is worth at least 3 Dice points, beyond the spread of seeds"
MINUTES, FINETUNE_MINUTES = 60.0, 5.0
LABELLED, QUICK_LABELLED, MAIN = (5, 10, 40), (5,), 10
EARLY = (1 / 6, 1 / 2)  # shares of the pre-training after which its encoder is tried too
ARMS = ("scratch", "pretrained")
GAIN, LOSS = 0.03, 0.8
TRAINER = "UMITPretrainTrainer"
AUGMENTATION = "nnunet"  # what "auto" chooses for so few cases; for 40 it would depend on the time of a step


class Labels(FewLabels):
    """The trainings of one invocation."""

    def __init__(self, options: argparse.Namespace, results: Results, minutes: float, tuning: float) -> None:
        super().__init__(options, results, "label_efficiency", f"{minutes:.3g}min+{tuning:.3g}min", {})
        self.minutes, self.tuning = minutes, tuning
        self.early = () if options.quick else EARLY
        self.kept: dict[float, str] = {}

    def pretrain(self) -> None:
        """Pre-train, unless that is done and its checkpoints are there."""
        key, bench = f"{self.prefix}pretrain", self.bench(DATASET, 1, self.minutes)
        seconds, folder = self.minutes * 60, bench.folder_of(key)
        if self.results.left(key):
            say(f"{key} ...")
            self.split(bench, 0)
            folder, started = bench.run_folder(key), time.perf_counter()
            keep = [share * seconds for share in self.early]
            stage = bench.stage(folder, "pretrain", TRAINER, PLANS, seconds, validate=True, keep_at_s=keep)
            described = {"dataset": DATASET, "minutes": self.minutes, "cores": self.options.threads}
            described |= {"figures": stage["figures"], **totals([stage])}
            self.results.put(key, described | {"everything_s": time.perf_counter() - started, **provenance()})
        bench.model(folder, TRAINER, PLANS)  # fails where it is gone: another one would have other figures
        stage = bench.report(folder, "pretrain")
        self.kept = {1.0: stage["checkpoint"]}
        self.kept |= {share: each["checkpoint"] for share, each in zip(self.early, stage["kept"], strict=True)}

    def compare(self, labelled: int, seed: int, arm: str, share: float = 1.0) -> None:
        """Fine-tune one arm if that is not done; ``share`` tells how far its pre-training had come."""
        early = "" if share == 1.0 else f"@{share * self.minutes:.3g}min"
        key = f"{self.prefix}{labelled}/seed{seed}/{arm}{early}"
        if self.results.left(key):
            if arm != "scratch" and not self.kept:
                self.pretrain()
            weights = None if arm == "scratch" else self.kept[share]
            pretrained = 0.0 if arm == "scratch" else share * self.minutes
            values = {"finetune.augmentation": AUGMENTATION}
            described = {"arm": arm, "pretrained_minutes": pretrained}
            self.finetune(key, DATASET, labelled, seed, self.tuning, weights, values=values, **described)


# ------------------------------------------------------------------------------------------------------- report
def by_number(runs: Mapping[str, Any], prefix: str) -> dict[int, dict[str, list[float]]]:
    """Dice of every seed, by number of labelled cases and arm."""
    return dict(sorted((int(labelled), arms) for labelled, arms in gathered(runs, prefix).items()))


def report(runs: Mapping[str, Any], prefix: str) -> str:
    """Mean Dice and the seeds by labelled cases, what the early encoders give, and the verdicts."""
    found, parts = by_number(runs, prefix), []
    rows = [[labelled, *(mean_and_seeds(arms.get(arm, [])) for arm in ARMS)] for labelled, arms in found.items()]
    parts.append(table(["labelled cases", *ARMS], rows))
    steps = [(run["pretrained_minutes"], run["dice"]["mean"]) for key, run in runs.items()
             if key.startswith(f"{prefix}{MAIN}/seed1/")]  # fmt: skip
    if len(steps) > len(ARMS):
        rows = [[f"{minutes:.3g}", f"{dice:.4f}"] for minutes, dice in sorted(steps)]
        parts.append(table(["minutes of pre-training", f"Dice, {MAIN} labelled cases, seed 1"], rows))
    pairs = by_seed(runs, f"{prefix}{MAIN}/", ARMS)
    if pairs:
        theirs, own = zip(*pairs, strict=True)
        gain = statistics.fmean(own) - statistics.fmean(theirs)
        apart = "do not overlap" if min(own) > max(theirs) else "OVERLAP"
        bar = verdict(gain, GAIN, at_most=False)
        more = max(run["pretrained_minutes"] for key, run in runs.items() if key.startswith(f"{prefix}{MAIN}/"))
        parts.append(
            f"gain in Dice at {MAIN} labelled cases, {len(own)} seed(s): {bar}; the seeds {apart}. The pre-trained arm "
            f"had {more:.3g} more minutes of the machine (pretraining_methods has an arm of equal time)"
        )
    pretraining = runs.get(f"{prefix}pretrain")
    if pretraining is not None:
        mean, cases = pretraining["figures"]["mean"], pretraining["figures"]["cases"]
        parts.append(f"masked loss on {cases} unseen cases: {verdict(mean['masked_loss'], LOSS)}")
    return "\n\n".join(parts)


def plot(runs: Mapping[str, Any], prefix: str, file: Path) -> None:
    """Dice against labelled cases: the mean as a line, every seed as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = by_number(runs, prefix)
    if not found:
        return
    figure, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    for arm, colour in zip(ARMS, ("#777777", "#0072B2"), strict=True):
        points = {labelled: arms[arm] for labelled, arms in found.items() if arms.get(arm)}
        axes.plot(list(points), [statistics.fmean(dice) for dice in points.values()], color=colour, label=arm)
        for labelled, dice in points.items():
            axes.plot([labelled] * len(dice), dice, "o", color=colour, markersize=4)
    axes.set_xscale("log")
    axes.set_xticks(list(found), [str(labelled) for labelled in found])
    axes.minorticks_off()
    axes.set_xlabel("labelled cases")
    axes.set_ylabel("mean Dice")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Run what is not done yet, then print the tables of all and draw the picture."""
    options_parser = training_parser(__doc__, MINUTES)
    add = options_parser.add_argument
    add("--finetune-minutes", type=float, default=None, help=f"of each fine-tuning (default {FINETUNE_MINUTES:g})")
    add("--seed", type=int, action="append", help="fine-tune with this seed only (may be repeated; default: 1, 2, 3)")
    add("--arm", action="append", choices=ARMS, help="run this arm only (may be repeated; default: both)")
    add("--labelled", type=int, action="append", choices=LABELLED, help="these numbers of labelled cases only")
    options = options_parser.parse_args(arguments)
    minutes = budget(options.minutes, options.quick, MINUTES)
    tuning = budget(options.finetune_minutes, options.quick, FINETUNE_MINUTES)
    settings = unusual(options_parser, options, "threads", "device")
    results = Results.of(options, "label_efficiency", CLAIM, settings)
    labels = Labels(options, results, minutes, tuning)
    numbers, seeds = (QUICK_LABELLED, [1]) if options.quick else ((MAIN, *sorted({*LABELLED} - {MAIN})), [1, 2, 3])
    numbers, arms = [each for each in numbers if each in (options.labelled or numbers)], options.arm or ARMS
    with alone_in(work_folder(options.work)):
        for labelled in numbers:
            for seed in options.seed or seeds:
                for arm in arms:
                    labels.compare(labelled, seed, arm)
            if labelled == MAIN and "pretrained" in arms:  # the claim's own number first, with all that is asked of it
                for share in labels.early:
                    labels.compare(MAIN, 1, "pretrained", share)
    picture = results.path.with_name(results.path.stem + ("_quick" if options.quick else "") + ".png")
    plot(results.runs, labels.prefix, picture)
    say(report(results.runs, labels.prefix))
    say(f"{options.threads} cores, {minutes:.3g} minutes of pre-training, {tuning:.3g} of each fine-tuning.")
    say(f"Results: {results.path.name} and {picture.name} in the results folder")


if __name__ == "__main__":
    main()
