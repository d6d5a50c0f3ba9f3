"""Hippocampus at 1 mm in training, with slices of 2 to 6 mm in testing: who still finds it?

Three arms learn fold 0 of the grouped split for ``--minutes`` (15) of wall time each (see budgeted_training.py):

- ``umit_native``    UMITTrainer, ``3d_native``: no resampling, spacing jitter as planned;
- ``umit_resampled`` UMITTrainer, ``3d_fullres``: everything resampled to 1 mm, so anisotropy level 0 throughout;
- ``primus_s``       nnU-Net's nnUNet_Primus_S_Trainer on its default plans, resampled alike.

The validation cases are thickened to 2, 3, 4 and 6 mm along each axis in turn (thick_slices.py: block averages, the
last slice repeated so that none is lost), predicted by nnU-Net without mirroring (thick_prediction.py), brought to the
1 mm grid, and compared with the untouched labels. Probabilities are brought there by linear interpolation; beside it
stands what the exported labels score when their slices are repeated. That alone costs perfect labels 0.15 Dice at 4 mm,
in every arm, so the claim is judged by the interpolated ones. ``thick grid`` is what the truth scores when it goes the
same way (shares of the classes in every thick voxel).

Claim: at 4 mm, umit_native loses less than half of what each resampling arm loses.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import few_cases, image_files, read_fold
from benchmarks.common import (
    DATASET,
    Results,
    budget,
    data_root,
    provenance,
    say,
    table,
    training_parser,
    unusual,
    work_folder,
    write_json,
)
from benchmarks.equal_time import STOCK_PLANS, Bench, alone_in, totals
from benchmarks.thick_slices import (
    AXES,
    Condition,
    class_shares,
    conditions,
    dice,
    interpolate_back,
    mean_dice,
    read_label,
    read_probabilities,
    repeat_back,
    thicken_file,
)

CLAIM = "trained at 1 mm, UMIT native loses less than half the Dice at 4 mm slices that arms which resample lose"
FOLD, MINUTES = 0, 15.0
THICKNESSES = (2, 3, 4, 6)
JUDGED_MM, BAR = 4, 0.5
LABELS = ("1", "2")
CEILING = "thick grid"


class Arm(NamedTuple):
    """Names as nnU-Net knows them, and which section of the umit block sets the budget (``stock``: none)."""

    trainer: str
    plans: str
    configuration: str
    stage: str


ARMS = {
    "umit_native": Arm("UMITTrainer", "UMITPlans", "3d_native", "finetune"),
    "umit_resampled": Arm("UMITTrainer", "UMITPlans", "3d_fullres", "finetune"),
    "primus_s": Arm("nnUNet_Primus_S_Trainer", STOCK_PLANS, "3d_fullres", "stock"),
}


# ------------------------------------------------------------------------------------------------------- scores
def by_thickness(scores: Mapping[str, Mapping[str, Any]]) -> dict[int, float]:
    """Mean Dice by slice thickness in mm: the mean over the axes."""
    found: dict[int, list[float]] = {}
    for name, score in scores.items():
        found.setdefault(int(name.split("mm")[0]), []).append(score["mean"])
    return {mm: sum(values) / len(values) for mm, values in sorted(found.items())}


def of_repeated_slices(scored: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The scores of the labels whose slices were repeated."""
    return {arm: {name: score["repeated"] for name, score in scores.items()} for arm, scores in scored.items()}


def loss_at(scores: Mapping[str, Mapping[str, Any]], mm: int) -> float:
    """Dice lost against 1 mm."""
    means = by_thickness(scores)
    return means[1] - means[mm]


def verdicts(scored: Mapping[str, Mapping[str, Any]], mm: int = JUDGED_MM) -> list[str]:
    """Loss of umit_native against that of each arm that resamples; no ratio is formed where that arm loses nothing."""
    arms = {arm: scores for arm, scores in scored.items() if arm in ARMS and mm in by_thickness(scores)}
    if "umit_native" not in arms:
        return []
    own, lines = loss_at(arms["umit_native"], mm), []
    for arm, scores in arms.items():
        if arm != "umit_native":
            other = loss_at(scores, mm)
            met = other > 0 and own < BAR * other
            share = f"{own / other:.2f} of it" if other > 0 else "no ratio: it loses nothing"
            line = f"loss at {mm} mm: umit_native {own:.4f}, {arm} {other:.4f}, {share} (bar below {BAR:g}: "
            lines.append(line + ("met)" if met else "NOT met)"))
    return lines


def report(scored: Mapping[str, Mapping[str, Any]]) -> str:
    """Dice by thickness, loss against 1 mm, Dice by axis; the verdicts; the same losses with repeated slices."""
    thicknesses = sorted({mm for scores in scored.values() for mm in by_thickness(scores)})
    heads = [f"{mm} mm" for mm in thicknesses]
    thick = [mm for mm in thicknesses if mm > 1]
    axes = [
        [arm, *(" / ".join(f"{scores[Condition(mm, axis).name]['mean']:.3f}" for axis in range(3)) for mm in thick)]
        for arm, scores in scored.items()
    ]
    repeated = of_repeated_slices(scored)
    parts = [
        table(["Dice, mean over axes", *heads], _dice_rows(scored, thicknesses)),
        table(["Dice lost against 1 mm", *heads], _lost_rows(scored, thicknesses)),
        table([f"Dice along {' / '.join(AXES)}", *(f"{mm} mm" for mm in thick)], axes),
        *verdicts(scored),
        table(["Dice, slices of the labels repeated", *heads], _dice_rows(repeated, thicknesses)),
        *(f"slices repeated, {line}" for line in verdicts(repeated)),
    ]
    return "\n\n".join(parts)


def _dice_rows(scored: Mapping[str, Mapping[str, Any]], thicknesses: Sequence[int]) -> list[list[Any]]:
    means = {arm: by_thickness(scores) for arm, scores in scored.items()}
    return [[arm, *(_four(values.get(mm)) for mm in thicknesses)] for arm, values in means.items()]


def _lost_rows(scored: Mapping[str, Mapping[str, Any]], thicknesses: Sequence[int]) -> list[list[Any]]:
    return [[arm, *(_four(loss_at(scores, mm)) for mm in thicknesses)] for arm, scores in scored.items()]


def _four(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


# ---------------------------------------------------------------------------------------------------------- plot
def plot(scored: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Dice against slice thickness: a line an arm (mean over axes), thin markers for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"umit_native": "#0072B2", "umit_resampled": "#D55E00", "primus_s": "#009E73", CEILING: "#777777"}
    figure, axes = pyplot.subplots(figsize=(8.5, 4.5), layout="constrained")
    cases = 0
    for arm, scores in scored.items():
        means, colour = by_thickness(scores), colours[arm]
        style = {"linestyle": "--", "linewidth": 1.2} if arm == CEILING else {"linewidth": 2.2}
        axes.plot(list(means), list(means.values()), color=colour, label=arm.replace("_", " "), **style)
        cases = scores["1mm"]["cases"]
        for axis, marker in enumerate("os^"):
            if arm != CEILING:
                own = [(mm, scores[Condition(mm, axis).name]["mean"]) for mm in means if mm > 1]
                axes.plot(*zip(*own, strict=True), marker, color=colour, alpha=0.45, markersize=4)
    for axis, marker in enumerate("os^"):
        axes.plot([], [], marker, color="#777777", alpha=0.6, markersize=4, label=f"thick along {AXES[axis]}")
    axes.set_xlabel("slice thickness (mm)")
    axes.set_ylabel(f"mean Dice against 1 mm labels ({cases} cases)")
    axes.set_xticks(sorted({mm for scores in scored.values() for mm in by_thickness(scores)}))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------- runs
class Robustness:
    """The thickened cases, and what is done with them, in one invocation."""

    def __init__(self, options: argparse.Namespace, minutes: float) -> None:
        self.options, self.minutes = options, minutes
        self.raw = data_root() / DATASET
        self.cases = few_cases(read_fold(data_root(), DATASET, FOLD), 0, options.cases)["val"]
        self.conditions = conditions((4,) if options.quick else THICKNESSES)
        self.images = work_folder(options.work) / "images" / f"{DATASET}_thick_{len(self.cases)}"

    def bench(self, arm: str) -> Bench:
        settings = {"minutes": self.minutes, "quick": self.options.quick, "threads": self.options.threads}
        return Bench(
            self.options, configuration=ARMS[arm].configuration, fold=FOLD, settings=settings, runs="spacing_robustness"
        )

    def train(self, arm: str, key: str) -> dict[str, Any]:
        """Train one arm; it is scored on the thickened cases only."""
        bench, how = self.bench(arm), ARMS[arm]
        folder, started = bench.run_folder(key), time.perf_counter()
        stage = bench.stage(folder, how.stage, how.trainer, how.plans, self.minutes * 60)
        described = {"arm": arm, "minutes": self.minutes, "fold": FOLD, "seed": bench.seed}
        described |= {"cores": self.options.threads, **totals([stage])}
        return described | {"everything_s": time.perf_counter() - started, **provenance()}

    def predict(self, arm: str, key: str) -> dict[str, Any]:
        """Predict and score all conditions with the model of the training ``key``."""
        bench, how = self.bench(arm), ARMS[arm]
        folder, started = bench.folder_of(key), time.perf_counter()
        for condition in self.conditions:
            for case in self.cases:
                for file in image_files(self.raw, case):
                    thicken_file(file, self.images / condition.name / file.name, condition)
        outputs = {each: folder / f"predicted_{len(self.cases)}" / each.name for each in self.conditions}
        job = {
            "model": str(bench.model(folder, how.trainer, how.plans)),
            "fold": FOLD,
            "threads": self.options.threads,
            "device": self.options.device,
            "folders": [[str(self.images / each.name), str(output)] for each, output in outputs.items()],
        }
        write_json(folder / "prediction.job.json", job)
        bench.call([sys.executable, "-m", "benchmarks.thick_prediction", str(folder / "prediction.job.json")], folder)
        scores = {each.name: self.score(each, output) for each, output in outputs.items()}
        return {"arm": arm, "scores": scores, "everything_s": time.perf_counter() - started, **provenance()}

    def score(self, condition: Condition, predictions: Path | None) -> dict[str, Any]:
        """Dice on the 1 mm grid, probabilities interpolated; ``repeated``: that of labels whose slices are repeated.

        Without predictions, that of the truth forced through the thick grid.
        """
        interpolated, repeated = {}, {}
        for case in self.cases:
            truth = read_label(self.raw / "labelsTr" / f"{case}.nii.gz")
            if predictions is None:
                probabilities = class_shares(truth, len(LABELS) + 1, condition)
                labels = probabilities.argmax(0)
            else:
                labels = read_label(predictions / f"{case}.nii.gz")
                probabilities = read_probabilities(predictions / f"{case}.npz", labels)
            for scores, found in (
                (interpolated, interpolate_back(probabilities, condition, truth.shape)),
                (repeated, repeat_back(labels, condition, truth.shape)),
            ):
                scores[case] = {label: dice(found, truth, int(label)) for label in LABELS}
        return mean_dice(interpolated) | {"repeated": mean_dice(repeated)}

    def ceiling(self) -> dict[str, Any]:
        """Score of the truth on every thick grid."""
        return {"scores": {each.name: self.score(each, None) for each in self.conditions}, **provenance()}


def run(options: argparse.Namespace, results: Results, prefix: str, minutes: float, arms: Sequence[str]) -> None:
    """Train, predict and score what is not stored yet."""
    keys = {arm: f"{prefix}seed{options.seed}/{arm}" for arm in arms}
    trainings = [arm for arm in arms if results.left(keys[arm] + "/training")]
    predictions = [arm for arm in arms if results.left(keys[arm] + "/thick")]
    if not trainings and not predictions and not results.left(prefix + CEILING):
        return
    robustness = Robustness(options, minutes)
    with alone_in(work_folder(options.work)):
        if results.left(prefix + CEILING):
            results.put(prefix + CEILING, robustness.ceiling())
        if trainings:
            wanted: dict[str, list[str]] = {}
            for arm in trainings:
                wanted.setdefault(ARMS[arm].plans, []).append(ARMS[arm].configuration)
            robustness.bench(trainings[0]).prepare(wanted)
        for arm, key in keys.items():
            if arm in trainings:
                say(f"{key}: training ...")
                results.put(key + "/training", robustness.train(arm, key))
            if arm in trainings or arm in predictions:
                say(f"{key}: predicting {len(robustness.conditions)} x {len(robustness.cases)} images ...")
                results.put(key + "/thick", robustness.predict(arm, key))


def scored_in(runs: Mapping[str, Any], prefix: str, seed: int) -> dict[str, Any]:
    """Finished scores by arm, and those of the true labels."""
    named = {arm: runs.get(f"{prefix}seed{seed}/{arm}/thick") for arm in ARMS} | {CEILING: runs.get(prefix + CEILING)}
    return {arm: run["scores"] for arm, run in named.items() if run is not None}


def main(arguments: list[str] | None = None) -> None:
    """Run what is not done yet, then print the tables of all and draw the picture."""
    options_parser = training_parser(__doc__, MINUTES)
    add = options_parser.add_argument
    add("--arm", action="append", choices=list(ARMS), help="run this arm only (may be repeated; default: all three)")
    add("--seed", type=int, default=1)
    add("--cases", type=int, default=None, help="validation cases to predict (default: all 42; quick: 2)")
    options = options_parser.parse_args(arguments)
    minutes = budget(options.minutes, options.quick, MINUTES)
    options.cases = options.cases or (2 if options.quick else None)
    settings = unusual(options_parser, options, "threads", "device")
    results = Results.of(options, "spacing_robustness", CLAIM, settings)
    limited = f"{options.cases}cases/" if options.cases else ""
    prefix = f"{'quick' if options.quick else 'full'}/fold{FOLD}/{minutes:.3g}min/{limited}"
    run(options, results, prefix, minutes, options.arm or list(ARMS))
    scored = scored_in(results.runs, prefix, options.seed)
    picture = results.path.with_name(results.path.stem + ("_quick" if options.quick else "") + ".png")
    plot(scored, picture)
    say(report(scored))
    say(f"One seed, one run an arm, {options.threads} cores, {minutes:.3g} minutes of training wall time each.")
    say(f"Results: {results.path.name} and {picture.name} in the results folder")


if __name__ == "__main__":
    main()
