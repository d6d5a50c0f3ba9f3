"""ACDC on its own grid against ACDC resampled: Dice after equal training time, and wall time of stock prediction.

``3d_native`` and ``3d_fullres`` of one UMITPlans, each trained from scratch by UMITTrainer for ``--minutes`` (15) of
wall time on ``--threads`` (2) cores, on fold 0 of the grouped split, with seeds 1 and 2; see budgeted_training.py for
what the clock counts. Validation is nnU-Net's own, with mirroring.

Then ``nnUNetv2_predict`` is timed end to end, as a sub-process: start of Python, reading, preprocessing, sliding window
without mirroring, export. Both configurations predict the same raw validation cases in turn, after one untimed call
each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import few_cases, link_images, read_fold
from benchmarks.common import Results, budget, provenance, say, table, training_parser, unusual, verdict, work_folder
from benchmarks.equal_time import Bench, alone_in, plans_copy, totals
from benchmarks.few_labels import by_seed
from benchmarks.prediction import arguments_of, timed_command
from benchmarks.timing import Sample, paired_ratio, summarise

CLAIM = "3d_native is not worse than 3d_fullres by more than 0.5 Dice points after equal training, and predicts faster"
ACDC = "Dataset027_ACDC"
FOLD = 0
ARMS = ("3d_native", "3d_fullres")
TRAINER, PLANS = "UMITTrainer", "UMITPlans"
MARGIN = 0.005  # Dice
MINUTES, REPEATS, CASES = 15.0, 3, 12
WORKERS = 1  # processes for preprocessing, and as many for export


def predict(bench: Bench, folder: Path, images: Path) -> Sample:
    """Run stock prediction with the model of a run folder; returns its wall and CPU seconds."""
    bench.model(folder, TRAINER, PLANS)  # fails where it is gone
    plans, output = plans_copy(PLANS, folder), folder / "predicted"
    words = arguments_of(bench, TRAINER, plans, images, output, WORKERS)
    return timed_command(bench, ["nnUNetv2_predict"], words, folder)


def dice_differences(runs: Mapping[str, Any], prefix: str) -> list[float]:
    """Dice of ``3d_native`` minus Dice of ``3d_fullres``, for every seed that both have."""
    return [native - resampled for native, resampled in by_seed(runs, prefix, ARMS)]


def judged(differences: Sequence[float]) -> str:
    """``-0.002 (+0.012 / -0.016; bar -0.005: undecided, ...)``: met or not only where every seed says so."""
    met = [difference >= -MARGIN for difference in differences]
    words = "met" if all(met) else "undecided, the seeds disagree" if any(met) else "NOT met"
    seeds = " / ".join(f"{each:+.3f}" for each in differences)
    return f"{statistics.fmean(differences):+.3f} ({seeds}; bar {-MARGIN:g}: {words})"


def seeds_in(runs: Mapping[str, Any], prefix: str) -> list[int]:
    """Seeds of the trainings whose key starts with ``prefix``."""
    names = {key.removeprefix(prefix).split("/")[0] for key in runs if key.startswith(prefix + "seed")}
    return sorted(int(name.removeprefix("seed")) for name in names)


def samples_in(runs: Mapping[str, Any], prefix: str) -> dict[str, list[Sample]]:
    """Timed predictions by arm; the n-th sample of each belongs to the same repeat."""
    repeats = [run for key, run in sorted(runs.items()) if key.startswith(prefix) and "/predict/" in key]
    return {arm: [Sample(**run["samples"][arm]) for run in repeats] for arm in ARMS}


def report(runs: Mapping[str, Any], prefix: str) -> str:
    """Both tables, and the verdicts on what has been measured so far."""
    rows = []
    for seed in seeds_in(runs, prefix):
        for arm in ARMS:
            run = runs.get(f"{prefix}seed{seed}/{arm}")
            if run is not None:
                classes = " / ".join(f"{dice:.4f}" for dice in run["dice"]["per_class"].values())
                mean, cases = f"{run['dice']['mean']:.4f}", run["dice"]["cases"]
                rows.append([arm, seed, run["iterations"], round(run["train_wall_s"]), mean, classes, cases])
    headers = ["configuration", "seed", "iterations", "wall s", "Dice", "RV / MYO / LV", "cases"]
    parts = [table(headers, rows)]
    differences = dice_differences(runs, prefix)
    if differences:
        parts.append(f"Dice, 3d_native - 3d_fullres, mean and seeds: {judged(differences)}")
    samples = samples_in(runs, prefix)
    if samples[ARMS[0]]:
        parts.append(prediction_table(samples))
        ratio = paired_ratio(samples[ARMS[0]], samples[ARMS[1]])["wall"]["median"]
        parts.append(f"wall time of prediction, 3d_native / 3d_fullres, median of pairs: {verdict(ratio, 1.0)}")
    return "\n\n".join(parts)


def prediction_table(samples: Mapping[str, Sequence[Sample]]) -> str:
    """Wall and CPU seconds of stock prediction: median, smallest and largest."""
    rows = []
    for arm, measured in samples.items():
        figures = summarise(measured)
        spreads = (figures["wall_s"], figures["cpu_s"])
        rows.append([arm, *(f"{each['median']:.1f} ({each['min']:.1f}-{each['max']:.1f})" for each in spreads)])
    return table(["prediction", "wall s: median (min-max)", "CPU s"], rows)


def train_arm(bench: Bench, key: str, minutes: float) -> dict[str, Any]:
    """Train and validate one arm with one seed."""
    folder, started = bench.run_folder(key), time.perf_counter()
    stage = bench.stage(folder, "finetune", TRAINER, PLANS, minutes * 60, validate=True)
    described = {"configuration": bench.configuration, "seed": bench.seed, "fold": FOLD, "minutes": minutes}
    described |= {"cores": bench.options.threads, **totals([stage])}
    return described | {"everything_s": time.perf_counter() - started, **provenance()}


def time_predictions(benches: Mapping[str, Bench], prefix: str, results: Results, repeats: list[int]) -> None:
    """Time some repeats; the arm that goes first rotates."""
    bench = benches[ARMS[0]]
    options, seed = bench.options, bench.seed
    chosen = few_cases(read_fold(bench.data, ACDC, FOLD), 0, options.cases)["val"]
    images = bench.work / "images" / f"{ACDC}_{len(chosen)}"
    link_images(bench.data / ACDC, chosen, images)
    folders = {arm: each.folder_of(f"{prefix}seed{seed}/{arm}") for arm, each in benches.items()}
    if not options.quick:
        say("predicting once for warming up ...")
        for arm, each in benches.items():
            predict(each, folders[arm], images)
    for repeat in repeats:
        first = repeat % len(ARMS)
        samples = {arm: predict(benches[arm], folders[arm], images) for arm in ARMS[first:] + ARMS[:first]}
        say(f"  repeat {repeat + 1}: " + ", ".join(f"{arm} {sample.wall:.1f} s" for arm, sample in samples.items()))
        content = {arm: {"wall": sample.wall, "cpu": sample.cpu} for arm, sample in samples.items()}
        described = {"cases": len(chosen), "seed": seed, "npp": WORKERS, "nps": WORKERS, "cores": options.threads}
        results.put(
            repeat_key(prefix, seed, repeat), {"samples": content, **described, **provenance()}, cases_of(options)
        )


def cases_of(options: argparse.Namespace) -> dict[str, int]:
    """Predicted cases, where they are not the usual number."""
    return {} if options.quick or options.cases == CASES else {"cases": options.cases}


def repeat_key(prefix: str, seed: int, repeat: int) -> str:
    """Key of one repeat of the timed predictions."""
    return f"{prefix}seed{seed}/predict/{repeat + 1}"


def run(options: argparse.Namespace, results: Results, prefix: str, seeds: list[int], minutes: float) -> None:
    """Train and time what is not stored yet."""
    trainings = [(seed, arm) for seed in seeds for arm in ARMS if results.left(f"{prefix}seed{seed}/{arm}")]
    numbers = range(options.repeats)
    keys = {each: repeat_key(prefix, seeds[0], each) for each in numbers}
    repeats = [each for each in numbers if results.left(keys[each], cases_of(options))]
    if not trainings and not repeats:
        return
    settings = {"minutes": minutes, "quick": options.quick, "threads": options.threads}
    benches = {
        (seed, arm): Bench(
            options, dataset=ACDC, configuration=arm, fold=FOLD, seed=seed, settings=settings, runs="native_spacing"
        )
        for seed in seeds
        for arm in ARMS
    }
    with alone_in(work_folder(options.work)):
        if trainings:
            benches[trainings[0]].prepare({PLANS: ARMS})
        for seed, arm in trainings:
            key = f"{prefix}seed{seed}/{arm}"
            say(f"{key} ...")
            results.put(key, train_arm(benches[seed, arm], key, minutes))
        if repeats:
            time_predictions({arm: benches[seeds[0], arm] for arm in ARMS}, prefix, results, repeats)


def main(arguments: list[str] | None = None) -> None:
    """Run what is not done yet, then print the tables of all."""
    options_parser = training_parser(__doc__, MINUTES)
    add = options_parser.add_argument
    add("--seed", type=int, action="append", help="run this seed only (may be repeated; default: 1 and 2)")
    add("--cases", type=int, default=None, help=f"raw validation cases to predict (default {CASES})")
    add("--repeats", type=int, default=None, help=f"timed predictions of each configuration (default {REPEATS})")
    options = options_parser.parse_args(arguments)
    minutes = budget(options.minutes, options.quick, MINUTES)
    options.cases = options.cases or (2 if options.quick else CASES)
    options.repeats = options.repeats or (1 if options.quick else REPEATS)
    seeds = options.seed or ([1] if options.quick else [1, 2])
    settings = unusual(options_parser, options, "threads", "device")
    results = Results.of(options, "native_spacing", CLAIM, settings)
    prefix = f"{'quick' if options.quick else 'full'}/fold{FOLD}/{minutes:.3g}min/"
    run(options, results, prefix, seeds, minutes)
    say(report(results.runs, prefix))
    say(f"Grouped fold {FOLD} of {ACDC}, {options.threads} cores, {minutes:.3g} minutes of training wall time each.")
    say(f"Results: {results.path.name} in the results folder")


if __name__ == "__main__":
    main()
