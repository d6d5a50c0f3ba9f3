"""Pre-training without labels and fine-tuning with few: what the benchmarks that ask whether it pays share."""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cases import few_cases, read_fold
from benchmarks.common import Results, provenance, say
from benchmarks.equal_time import CONFIGURATION, Bench, totals

PLANS = "UMITPlans"
VALIDATED = 40  # cases at most


class FewLabels:
    """The trainings of one invocation, all on one grouped fold of their dataset.

    Args:
        name: of the benchmark: folder of its runs.
        budget: of its trainings, as the keys of its results have it, e.g. ``20min+5min``.
        settings: what its results depend on, beside the minutes of a training.
    """

    def __init__(
        self, options: argparse.Namespace, results: Results, name: str, budget: str, settings: Mapping[str, Any]
    ) -> None:
        self.options, self.results, self.name = options, results, name
        self.fold = options.validation_fold
        self.prefix = f"{'quick' if options.quick else 'full'}/fold{self.fold}/{budget}/"
        self.settings = {"quick": options.quick, "threads": options.threads, **settings}
        self.planned: set[str] = set()

    def bench(self, dataset: str, seed: int, minutes: float) -> Bench:
        """Folders and sub-processes for one training."""
        settings = self.settings | {"minutes": minutes}
        bench = Bench(self.options, dataset=dataset, fold=self.fold, seed=seed, settings=settings, runs=self.name)
        if dataset not in self.planned:
            bench.plan(PLANS, [CONFIGURATION])
            self.planned.add(dataset)
        return bench

    def split(self, bench: Bench, labelled: int) -> dict[str, list[str]]:
        """Put the cases of the next training in place: the first ``labelled`` of the fold, or all (0)."""
        split = read_fold(bench.data, bench.dataset, self.fold)
        chosen = few_cases(split, labelled or len(split["train"]), VALIDATED)
        bench.set_fold(chosen)
        return chosen

    def finetune(
        self,
        key: str,
        dataset: str,
        labelled: int,
        seed: int,
        minutes: float,
        weights: str | None,
        values: Mapping[str, Any] | None = None,
        **described: Any,
    ) -> None:
        """Fine-tune, with ``values`` of the umit block, and validate; the result says what was asked for."""
        say(f"{key} ...")
        bench = self.bench(dataset, seed, minutes)
        chosen = self.split(bench, labelled)
        folder, started = bench.run_folder(key), time.perf_counter()
        stage = bench.stage(
            folder, "finetune", "UMITTrainer", PLANS, minutes * 60, values=values, validate=True,
            pretrained_weights=weights,
        )  # fmt: skip
        content = {"dataset": dataset, "labelled": len(chosen["train"]), "seed": seed, "minutes": minutes, **described}
        content |= {"cores": self.options.threads, **totals([stage])}
        self.results.put(key, content | {"everything_s": time.perf_counter() - started, **provenance()})


def gathered(runs: Mapping[str, Any], prefix: str) -> dict[str, dict[str, list[float]]]:
    """Dice of every seed, by task and arm; keys are ``<prefix><task>/seed<S>/<arm>``."""
    found: dict[str, dict[str, list[float]]] = {}
    for key, run in sorted(runs.items()):
        parts = re.fullmatch(r"(.+)/seed\d+/([^/]+)", key.removeprefix(prefix))
        if key.startswith(prefix) and parts:
            found.setdefault(parts[1], {}).setdefault(parts[2], []).append(run["dice"]["mean"])
    return found


def by_seed(runs: Mapping[str, Any], prefix: str, arms: Sequence[str]) -> list[tuple[float, ...]]:
    """Dice of ``arms`` with one seed, for each seed that all of them have; keys are ``<prefix>seed<S>/<arm>``."""
    return [tuple(run["dice"]["mean"] for run in each) for each in pairs_of_seeds(runs, prefix, arms)]


def pairs_of_seeds(runs: Mapping[str, Any], prefix: str, arms: Sequence[str]) -> list[tuple[Any, ...]]:
    """The runs of ``arms`` with one seed, for each seed that all of them have."""
    named = re.compile(re.escape(prefix) + r"seed(\d+)/[^/]+")
    seeds = sorted({int(found[1]) for key in runs if (found := named.fullmatch(key))})
    keys = [[f"{prefix}seed{seed}/{arm}" for arm in arms] for seed in seeds]
    return [tuple(runs[key] for key in each) for each in keys if all(key in runs for key in each)]


def mean_and_seeds(dice: Sequence[float]) -> str | None:
    """``0.8100 (0.8000 / 0.8200)``: the mean, and every seed."""
    if not dice:
        return None
    return f"{statistics.fmean(dice):.4f} ({' / '.join(f'{each:.4f}' for each in dice)})"
