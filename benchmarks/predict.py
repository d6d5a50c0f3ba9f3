"""Wall time of stock ``nnUNetv2_predict``, start of Python included: UMIT against PlainConvUNet and Primus-S.

20 hippocampus and 12 ACDC cases (the first validation cases of grouped fold 0), ``-device cpu --disable_tta``, every
arm with the network and preprocessing of its plans. Weights are those of new networks: time does not depend on them,
and nobody has to train for hours first (random labels are a little slower to compress, for every arm). Measured:

- end to end, ``-npp 1 -nps 1``, in turn, ``--repeats`` (3) after one untimed call each;
- in one process (``-npp 0 -nps 0``) with a stop-watch: start-up, preprocessing, network, resampling, export, the rest.

Also the start of things: ``import nnunet_umit``, and what the hook adds to ``python -c pass``.

Claim: on the hippocampus UMIT takes at most half of PlainConvUNet's wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.accuracy import STOCK
from benchmarks.cases import few_cases, link_images, read_fold
from benchmarks.common import (
    DATASET,
    WITH_BYTECODE,
    Results,
    add_place,
    parser,
    provenance,
    say,
    table,
    unusual,
    verdict,
)
from benchmarks.equal_time import CONFIGURATION, Bench, alone_in, demanded, edit_plans, plans_copy
from benchmarks.prediction import arguments_of, timed_command
from benchmarks.timed_predict import PARTS
from benchmarks.timing import Sample, paired_ratio, spread, summarise

CLAIM = "nnUNetv2_predict end to end on 20 hippocampus cases takes at most half of PlainConvUNet's wall time"
BAR, IMPORT_MS, HOOK_MS = 0.5, 20.0, 1.0
FOLD = 0
CASES = {DATASET: 20, "Dataset027_ACDC": 12}
ARMS = {"PlainConvUNet": STOCK["nnunet"], "Primus-S": STOCK["primus_s"], "UMIT": ("UMITTrainer", "UMITPlans")}
REFERENCE = "PlainConvUNet"
STARTS = {"python -c pass, no hook": ["-S", "-c", "pass"], "python -c pass": ["-c", "pass"]}
INSIDE = {  # timed in a process of their own
    "import nnunet_umit": "import nnunet_umit",
    "hook alone": "import nnunet_umit.registration as r; r.install()",
}


def write_new_model(base: Path, model: Path, trainer: str, plans: Mapping[str, Any]) -> int:
    """A model folder as stock prediction reads it, with the weights of a new network; returns their number."""
    import torch
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset = json.loads((base / "dataset.json").read_text(encoding="utf-8"))
    manager = PlansManager(dict(plans))
    configuration = manager.get_configuration(CONFIGURATION)
    channels = determine_num_input_channels(manager, configuration, dataset)
    outputs = manager.get_label_manager(dataset).num_segmentation_heads
    found = recursive_find_trainer_class_by_name(trainer)
    torch.manual_seed(0)
    network = found.build_network_architecture(manager, configuration, channels, outputs, enable_deep_supervision=False)
    fold = model / f"fold_{FOLD}"
    fold.mkdir(parents=True, exist_ok=True)
    content = {
        "network_weights": network.state_dict(),
        "trainer_name": trainer,
        "init_args": {"configuration": CONFIGURATION},
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(content, fold / "checkpoint_final.pth")
    (model / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    (model / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    return sum(parameter.numel() for parameter in network.parameters())


class Predictions:
    """The predictions of one dataset."""

    def __init__(self, options: argparse.Namespace, dataset: str) -> None:
        self.options, self.dataset = options, dataset
        settings = {"quick": options.quick, "threads": options.threads}
        self.bench = Bench(options, dataset=dataset, fold=FOLD, seed=1, settings=settings, runs="predict")
        self.folders: dict[str, Path] = {}
        self.parameters: dict[str, int] = {}

    def prepare(self) -> None:
        """Plan, write the models, link the images."""
        split = read_fold(self.bench.data, self.dataset, FOLD)
        cases = few_cases(split, 0, 2 if self.options.quick else CASES[self.dataset])["val"]
        self.cases, self.images = len(cases), self.bench.work / "images" / f"{self.dataset}_{len(cases)}"
        link_images(self.bench.data / self.dataset, cases, self.images)
        self.bench.prepare({plans: [CONFIGURATION] for _, plans in ARMS.values()})
        for arm, (trainer, plans) in ARMS.items():
            folder = self.bench.run_folder(f"{self.dataset}/{arm}")
            name = plans_copy(plans, folder)
            edit_plans(self.bench.base, plans, name, umit=demanded(trainer, self.bench.base, plans))
            content = json.loads((self.bench.base / f"{name}.json").read_text(encoding="utf-8"))
            model = folder / self.dataset / f"{trainer}__{name}__{CONFIGURATION}"
            self.parameters[arm] = write_new_model(self.bench.base, model, trainer, content)
            self.folders[arm] = folder

    def words(self, arm: str, workers: int) -> list[str]:
        """Arguments of the command."""
        (trainer, plans), folder = ARMS[arm], self.folders[arm]
        return arguments_of(self.bench, trainer, plans_copy(plans, folder), self.images, folder / "out", workers)

    def measure(self, repeats: int) -> dict[str, Any]:
        """Both measurements of every arm."""
        samples: dict[str, list[Sample]] = {arm: [] for arm in ARMS}
        parts: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        arms = list(ARMS)
        for repeat in range(-1, repeats):
            first = repeat % len(arms)
            for arm in arms[first:] + arms[:first]:
                sample = timed_command(self.bench, ["nnUNetv2_predict"], self.words(arm, 1), self.folders[arm])
                watched = self.watched(arm)
                if repeat >= 0:  # the first turn warms up
                    samples[arm].append(sample)
                    parts[arm].append(watched)
            walls = ", ".join(f"{arm} {found[-1].wall:.1f} s" for arm, found in samples.items() if found)
            say(f"  repeat {repeat + 1} of {repeats}: {walls or 'warm'}")
        return {
            "dataset": self.dataset,
            "cases": self.cases,
            "cores": self.options.threads,
            "arms": {
                arm: summarise(samples[arm])
                | {
                    "parameters": self.parameters[arm],
                    "ratio": paired_ratio(samples[arm], samples[REFERENCE]),
                    "parts_s": {part: spread([each[part] for each in parts[arm]]) for part in PARTS},
                }
                for arm in ARMS
            },
            **provenance(),
        }

    def watched(self, arm: str) -> dict[str, float]:
        """Seconds by part of one prediction in one process."""
        report = self.folders[arm] / "parts.json"
        program = [sys.executable, "-m", "benchmarks.timed_predict", str(report), repr(time.time())]
        timed_command(self.bench, program, self.words(arm, 0), self.folders[arm])
        return json.loads(report.read_text(encoding="utf-8"))


def starts(repeats: int) -> dict[str, Any]:
    """Wall time of starting Python without and with site-packages (and so our hook), and of our package, in turn."""
    found: dict[str, list[float]] = {name: [] for name in (*STARTS, *INSIDE)}
    environment = os.environ | WITH_BYTECODE
    for _ in range(repeats + 1):  # the first turn compiles, and does not count
        for name, words in STARTS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, env=environment)
            found[name].append(time.perf_counter() - began)
        # -S: no hook ran before, so that nothing of ours is imported yet; os is what every start has imported
        path = [str(Path(sys.modules["benchmarks"].__path__[0]).parent)]
        for name, code in INSIDE.items():
            timed = f"began = time.perf_counter(); {code}; print(time.perf_counter() - began)"
            command = [sys.executable, "-S", "-c", f"import os, sys, time; sys.path[:0] = {path!r}; {timed}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found[name].append(float(done.stdout))
    return {
        "repeats": repeats,
        "ms": {name: spread([1000 * each for each in values[1:]]) for name, values in found.items()},
    }


def report(run: Mapping[str, Any]) -> str:
    """Tables of one dataset, and the verdict where it is the claim's."""
    arms = run["arms"]
    rows = []
    for name, arm in arms.items():
        wall, ratio = arm["wall_s"], arm["ratio"]["wall"]
        spreads = [
            f"{each['median']:.2f} ({each['min']:.2f}-{each['max']:.2f})" for each in (wall, arm["cpu_s"], ratio)
        ]
        rows.append([name, f"{arm['parameters'] / 1e6:.1f}", *spreads])
    heads = ["network", "M parameters", "wall s: median (min-max)", "CPU s", f"wall / {REFERENCE}"]
    parts = [[name, *(f"{arm['parts_s'][part]['median']:.2f}" for part in PARTS)] for name, arm in arms.items()]
    lines = [
        f"{run['dataset']}, {run['cases']} cases, {arms[REFERENCE]['repeats']} paired repeats",
        table(heads, rows),
        table(["in one process, wall s", *PARTS], parts),
    ]
    if run["dataset"] == DATASET:
        lines.append(f"UMIT / {REFERENCE}, wall: {verdict(arms['UMIT']['ratio']['wall']['median'], BAR)}")
    return "\n\n".join(lines)


def report_starts(run: Mapping[str, Any]) -> str:
    """Table of the starts, and the verdicts."""
    ms = run["ms"]
    rows = [[name, *(f"{each[key]:.1f}" for key in ("median", "min", "max"))] for name, each in ms.items()]
    return "\n\n".join(
        [
            table(["start, ms", "median", "min", "max"], rows),
            f"import nnunet_umit, ms: {verdict(ms['import nnunet_umit']['median'], IMPORT_MS)}",
            f"hook alone, ms: {verdict(ms['hook alone']['median'], HOOK_MS)}",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not done yet and print the tables."""
    options_parser = parser(__doc__)
    add = options_parser.add_argument
    add("--dataset", choices=list(CASES), action="append", help="default: both (quick: hippocampus)")
    add("--repeats", type=int, default=None, help="paired repeats (quick 1, full 3)")
    add("--replan", action="store_true", help="plan and preprocess with the UMIT planner again")
    add_place(options_parser)
    options = options_parser.parse_args(arguments)
    settings = unusual(options_parser, options, "device")
    results, mode = Results.of(options, "predict", CLAIM, settings), "quick" if options.quick else "full"
    repeats = options.repeats or (1 if options.quick else 3)
    key = f"{mode}/start"
    if results.left(key):
        results.put(key, starts(5 if options.quick else 31) | provenance())
    for dataset in options.dataset or ([DATASET] if options.quick else list(CASES)):
        key = f"{mode}/{dataset}/threads{options.threads}"
        if results.left(key):
            say(f"{key} ...")
            predictions = Predictions(options, dataset)
            with alone_in(predictions.bench.work):
                predictions.prepare()
                results.put(key, predictions.measure(repeats))
        say(report(results.get(key)))
    say(report_starts(results.get(f"{mode}/start")))


if __name__ == "__main__":
    main()
