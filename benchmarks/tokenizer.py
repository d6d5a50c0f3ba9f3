"""The soft tokenizer on hippocampus, and soft against gumbel against nearest tokens.

UMITTokenizerTrainer learns the training cases of grouped fold 0 and is judged on its validation cases:

- ``soft`` for ``--minutes`` (20): PSNR, perplexity (bar: half the codebook), mean token entropy (bar: 1 nat);
- ``soft``, ``gumbel`` and ``nearest`` for ``--compare-minutes`` (6) each, with seeds 1, 2 and 3.

Claim: soft tokens use at least as many codes as both others, with equal or better PSNR.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
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
from benchmarks.equal_time import CONFIGURATION, Bench, alone_in, totals
from benchmarks.few_labels import pairs_of_seeds

CLAIM = "soft tokens use at least as many codes as gumbel and nearest ones, with equal or better PSNR"
FOLD, MINUTES, COMPARED_MINUTES = 0, 20.0, 6.0
MODES = ("soft", "gumbel", "nearest")
TRAINER, PLANS = "UMITTokenizerTrainer", "UMITPlans"
PERPLEXITY, ENTROPY = 0.5, 1.0


def train(bench: Bench, key: str, mode: str, minutes: float) -> dict[str, Any]:
    """Train and judge one tokenizer."""
    folder, started = bench.run_folder(key), time.perf_counter()
    values = {"tokenizer.quantiser": mode}
    stage = bench.stage(folder, "tokenizer", TRAINER, PLANS, minutes * 60, values=values, validate=True)
    codes = bench.umit_value(PLANS, "tokenizer", "codes")
    described = {"quantiser": mode, "seed": bench.seed, "minutes": minutes, "fold": FOLD, "codes": codes}
    described |= {"cores": bench.options.threads, "figures": stage["figures"], **totals([stage])}
    return described | {"everything_s": time.perf_counter() - started, **provenance()}


def row(name: str, run: Mapping[str, Any]) -> list[object]:
    """One line of the table: means over cases, and the codebook over all cases together."""
    mean, pooled = run["figures"]["mean"], run["figures"]["pooled"]
    return [
        name, run["seed"], f"{run['minutes']:.3g}", run["iterations"], f"{mean['psnr']:.2f}", f"{mean['ssim']:.3f}",
        f"{pooled['codes_used']:.0f} of {run['codes']}", f"{pooled['perplexity']:.1f}", f"{pooled['entropy']:.3f}",
        run["figures"]["cases"],
    ]  # fmt: skip


def verdicts(runs: Mapping[str, Any], main: str, prefix: str) -> list[str]:
    """The bars of the long run, and the comparison of means over seeds."""
    lines = []
    if main in runs:
        pooled = runs[main]["figures"]["pooled"]
        share = pooled["perplexity"] / runs[main]["codes"]
        lines.append(f"perplexity as a share of the codebook: {verdict(share, PERPLEXITY, at_most=False)}")
        lines.append(f"mean token entropy, nat: {verdict(pooled['entropy'], ENTROPY)}")
    for other in MODES[1:]:
        pairs = pairs_of_seeds(runs, prefix, ("soft", other))
        for name, part in (("codes_used", "pooled"), ("psnr", "mean")) if pairs else ():
            found = [[run["figures"][part][name] for run in pair] for pair in pairs]
            own, theirs = map(statistics.fmean, zip(*found, strict=True))
            met = "met" if own >= theirs else "NOT met"
            lines.append(f"{name}, mean over {len(pairs)} seed(s): soft {own:.2f}, {other} {theirs:.2f} ({met})")
    return lines


def report(runs: Mapping[str, Any], long: str, prefix: str) -> str:
    """Table of all tokenizers, and the verdicts; nothing where there are none."""
    shown = [long, *(key for key in runs if key.startswith(prefix) and key.endswith(MODES))]
    rows = [row(key.split("/")[-1], runs[key]) for key in shown if key in runs]
    if not rows:
        return ""
    headers = ["tokens", "seed", "minutes", "iterations", "PSNR dB", "SSIM", "codes used", "perplexity", "entropy"]
    return "\n\n".join([table([*headers, "cases"], rows), *verdicts(runs, long, prefix)])


def main(arguments: list[str] | None = None) -> None:
    """Run what is not done yet, then print the table of all."""
    options_parser = training_parser(__doc__, MINUTES)
    add = options_parser.add_argument
    add(
        "--compare-minutes", type=float, default=None, help=f"of each compared tokenizer (default {COMPARED_MINUTES:g})"
    )
    add("--seed", type=int, action="append", help="compare with this seed only (may be repeated; default: 1, 2 and 3)")
    options = options_parser.parse_args(arguments)
    minutes = budget(options.minutes, options.quick, MINUTES)
    compared = budget(options.compare_minutes, options.quick, COMPARED_MINUTES)
    settings = unusual(options_parser, options, "threads", "device")
    results = Results.of(options, "tokenizer", CLAIM, settings)
    mode = "quick" if options.quick else "full"
    long, prefix = f"{mode}/fold{FOLD}/{minutes:.3g}min/seed1/soft-alone", f"{mode}/fold{FOLD}/{compared:.3g}min/"
    todo = [(long, "soft", 1, minutes)]
    todo += [
        (f"{prefix}seed{seed}/{each}", each, seed, compared)
        for seed in options.seed or ([1] if options.quick else [1, 2, 3])
        for each in MODES
    ]
    todo = [each for each in todo if results.left(each[0])]
    if todo:
        run(options, results, todo)
    say(report(results.runs, long, prefix))
    say(f"Grouped fold {FOLD} of {DATASET}: trained on its training cases, judged on its validation cases.")
    say(f"Results: {results.path.name} in the results folder")


def run(options: argparse.Namespace, results: Results, todo: list[tuple[str, str, int, float]]) -> None:
    """Train what is not stored yet."""
    with alone_in(work_folder(options.work)):
        for index, (key, mode, seed, minutes) in enumerate(todo):
            settings = {"minutes": minutes, "quick": options.quick, "threads": options.threads}
            bench = Bench(options, fold=FOLD, seed=seed, settings=settings, runs="tokenizer")
            if index == 0:
                bench.prepare({PLANS: [CONFIGURATION]})
            say(f"{key} ...")
            results.put(key, train(bench, key, mode, minutes))


if __name__ == "__main__":
    main()
