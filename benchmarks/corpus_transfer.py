"""Does pre-training on whatever lies around help? One corpus of all datasets, then ten labelled cases of three of them.

- A: ``umit import`` makes a dataset of the unlabelled folder, ``umit corpus`` one corpus of it and eight datasets.
- B: UMITPretrainTrainer learns ``3d_native`` of the corpus, fold ``all``, for ``--minutes`` (30) of wall time; the
  memory of all its processes is sampled every second, and the log must show every dataset and anisotropy level.
- C: UMITTrainer learns ten labelled cases of a dataset for ``--finetune-minutes`` (4), with the corpus encoder and from
  scratch, two seeds each, and is validated by nnU-Net itself on validation cases of grouped fold 0 (at most 40).

The corpus holds the images of the validation cases too, without labels: B never opens a label.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import few_cases, read_fold
from benchmarks.common import Results, budget, provenance, say, table, training_parser, unusual, verdict, work_folder
from benchmarks.equal_time import Bench, alone_in, totals
from benchmarks.memory import MemoryWatch

CLAIM = "an encoder pre-trained on a corpus of all datasets improves or equals scratch on ten labelled cases"
ROOM = "corpus_transfer"
EXTRA, CORPUS = "Dataset901_Extra", "Dataset900_Corpus"
MASKS = ("*_cordseg.nii.gz", "*_gmseg.nii.gz", "*_modelseg.nii.gz")  # label maps among the unlabelled images
DATASETS, QUICK_DATASETS = (4, 27, 120, 121, 122, 123, 124, 125), (122, 124)
TARGETS, QUICK_TARGETS = {4: "3d_fullres", 27: "3d_fullres", 124: "2d"}, {124: "2d"}
ARMS = ("corpus", "scratch")
MINUTES, FINETUNE_MINUTES = 30.0, 4.0
LABELLED, VALIDATED = 10, 40
MEMORY_GB = 4.0
EQUAL = 0.005  # Dice
GROUP = re.compile(r"masked loss, (\S+, (?:level \d+|2D)): (\S+) \((\d+) samples\)")


# -------------------------------------------------------------------------------------------------- pure parts
def loss_by_group(log: str) -> dict[str, dict[str, Any]]:
    """From the log of a pre-training: loss of every dataset and level in its first and last epoch, and its samples."""
    found: dict[str, dict[str, Any]] = {}
    for name, loss, samples in GROUP.findall(log):
        group = found.setdefault(name, {"first": float(loss), "samples": 0, "epochs": 0})
        group["last"] = float(loss)
        group["samples"] += int(samples)
        group["epochs"] += 1
    return dict(sorted(found.items()))


def last_epoch(log: str) -> list[str]:
    """The lines of the last epoch that tell a loss, without their time stamps."""
    epoch = re.split(r": Epoch \d+\b", log)[-1]
    return [line[line.index("masked loss") :].strip() for line in epoch.splitlines() if "masked loss, " in line]


def expected_groups(datasets: Iterable[str], spacings: Iterable[Sequence[float]]) -> list[str]:
    """``Dataset027_ACDC, level 3`` and the like for every image of a corpus, each once."""
    from nnunet_umit.architectures.native import depth_first
    from nnunet_umit.spacing import Anisotropy

    found = set()
    for dataset, spacing in zip(datasets, spacings, strict=True):
        anisotropy = Anisotropy.from_spacing(depth_first(spacing))
        found.add(f"{dataset}, " + ("2D" if anisotropy.planar else f"level {anisotropy.level}"))
    return sorted(found)


def plans_for(size: str) -> str:
    """Plans whose network has the size of the corpus: an encoder only fits a network of its own size."""
    return "UMITPlans" if size == "XS" else f"UMITPlans{size}"


def differences(runs: Mapping[str, Any], prefix: str, dataset: str) -> list[float]:
    """Dice with the corpus encoder minus Dice from scratch, of every seed that has both."""
    found = []
    for key, run in sorted(runs.items()):
        if key.startswith(f"{prefix}{dataset}/") and key.endswith("/corpus"):
            other = runs.get(key.removesuffix("corpus") + "scratch")
            if other is not None:
                found.append(run["dice"]["mean"] - other["dice"]["mean"])
    return found


def sentence(dataset: str, found: Sequence[float]) -> str:
    """What the differences say, and no more than they do."""
    mean = sum(found) / len(found)
    if mean > EQUAL:
        text = f"the corpus encoder helps: Dice {mean:+.4f}"
    elif mean >= -EQUAL:
        text = f"no difference to speak of: Dice {mean:+.4f} with the corpus encoder"
    else:
        text = f"the corpus encoder does NOT help: Dice {mean:+.4f}"
    mixed = "; the seeds disagree" if min(found) < 0 < max(found) else ""
    return f"{dataset}: {text} (mean of {len(found)} seed{'s' if len(found) > 1 else ''}{mixed})"


def report(runs: Mapping[str, Any], key: str, prefix: str) -> str:
    """Loss of the corpus by dataset and level, memory, and Dice of the fine-tuned networks."""
    parts = []
    run = runs.get(key)
    if run is not None:
        rows = [[name, each["samples"], each["first"], each["last"]] for name, each in run["groups"].items()]
        parts.append(table(["dataset and level", "samples", "loss, first epoch", "last"], rows))
        missing = ", ".join(run["missing"]) or "none"
        done = f"{run['iterations']} iterations in {run['train_wall_s']:.0f} s"
        parts.append(f"{done}; datasets and levels that the log does not show: {missing}")
        rss, pss = run["memory"]["peak_rss_gb"], run["memory"]["peak_pss_gb"]
        parts.append(
            "peak memory was not measured (no /proc)"
            if rss is None
            else f"peak memory of all processes, GB: RSS {verdict(rss, MEMORY_GB)}; PSS {pss:.3f}"
        )
    rows, sentences = [], []
    tuned = {name: run for name, run in runs.items() if name.startswith(prefix)}
    for dataset in dict.fromkeys(name.removeprefix(prefix).split("/")[0] for name in tuned):
        for name, run in tuned.items():
            found, seed, arm = name.removeprefix(prefix).split("/")
            if found == dataset:
                classes = " / ".join(f"{dice:.4f}" for dice in run["dice"]["per_class"].values())
                mean, cases = f"{run['dice']['mean']:.4f}", run["dice"]["cases"]
                rows.append([dataset, run["configuration"], seed, arm, run["iterations"], mean, classes, cases])
        found_differences = differences(runs, prefix, dataset)
        if found_differences:
            sentences.append(sentence(dataset, found_differences))
    if rows:
        heads = ["dataset", "configuration", "seed", "encoder", "iterations", "Dice", "Dice of each class", "cases"]
        parts += [table(heads, rows), "\n".join(sentences)]
    return "\n\n".join(parts)


# -------------------------------------------------------------------------------------------------------- steps
class Transfer:
    """The three steps of one invocation, in nnU-Net folders of their own."""

    def __init__(self, options: argparse.Namespace, results: Results, minutes: float) -> None:
        self.options, self.results, self.minutes = options, results, minutes
        self.corpus = self.bench(CORPUS, "3d_native", "all", 1, minutes)
        self.data, self.home = self.corpus.data, self.corpus.base / "UMITPlans_3d_native"
        self.numbers = QUICK_DATASETS if options.quick else DATASETS
        self.targets = QUICK_TARGETS if options.quick else TARGETS
        self.planned: set[str] = set()

    def bench(self, dataset: str, configuration: str, fold: int | str, seed: int, minutes: float) -> Bench:
        settings = {"minutes": minutes, "quick": self.options.quick, "threads": self.options.threads}
        return Bench(
            self.options, dataset=dataset, configuration=configuration, fold=fold, seed=seed,
            settings=settings, room=ROOM,
        )  # fmt: skip

    def name(self, number: int) -> str:
        found = sorted(self.data.glob(f"Dataset{number:03d}_*"))
        if not found:
            raise FileNotFoundError(f"Dataset{number:03d} is not in the data folder; set UMIT_DATA to one that has it")
        return found[0].name

    def build(self, key: str) -> None:
        """Step A, with the commands a user types."""
        if (self.home / "corpus.json").is_file() and not self.results.left(key):
            return
        from nnunet_umit.cli.stock import find_command

        self.corpus.raw.mkdir(parents=True, exist_ok=True)
        for number in self.numbers:
            if not (self.corpus.raw / self.name(number)).exists():
                (self.corpus.raw / self.name(number)).symlink_to(self.data / self.name(number))
        folder, umit, started = self.corpus.work / "corpus", str(find_command("umit")), time.perf_counter()
        importing = ["import", str(self.data / "unlabelled_extra"), "--dataset", EXTRA[7:10], "--name", EXTRA[11:]]
        importing += [word for mask in MASKS for word in ("--exclude", mask)]
        if not (self.corpus.raw / EXTRA / "dataset.json").is_file():
            say("umit import ...")
            self.corpus.call([umit, *importing], folder, accepted=(0, 1))  # 1: something is in quarantine
            if not (self.corpus.raw / EXTRA / "dataset.json").is_file():
                raise RuntimeError(f"`umit import` wrote no {EXTRA}; see {folder}/log.txt")
        joining = ["corpus", *(word for each in self.numbers for word in ("-d", str(each))), "-d", EXTRA[7:10]]
        joining += ["--id", CORPUS[7:10], "--name", CORPUS[11:]]
        say("umit corpus: planning and preprocessing what is missing ...")
        self.corpus.call([umit, *joining], folder)
        made = self.read()
        printed = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        content = {
            "commands": [" ".join(["umit", *each]).replace(str(self.data), "DATA") for each in (importing, joining)],
            "datasets": [list(row) for row in made.table()],
            "images": len(made.case),
            "quarantined": [line for line in printed if "quarantined" in line][-1:],
            "wall_s": time.perf_counter() - started,
        }
        self.results.put(key, content | provenance())

    def read(self) -> Any:
        """The corpus as it was written."""
        from nnunet_umit.plans.corpus import Corpus

        corpus = Corpus.read(self.home)
        if corpus is None:
            raise FileNotFoundError(f"`umit corpus` left nothing in {self.home}; see corpus/log.txt in the work folder")
        return corpus

    def pretrain(self, key: str) -> None:
        """Step B."""
        folder = self.corpus.run_folder(key)
        if not (folder / "memory.json").is_file():  # trained to the end without being watched: once more
            (folder / "pretrain.report.json").unlink(missing_ok=True)
        with MemoryWatch(folder / "memory.json") as watch:
            stage = self.corpus.stage(folder, "pretrain", "UMITPretrainTrainer", "UMITPlans", self.minutes * 60)
        logs = Path(stage["checkpoint"]).parent.glob("training_log_*.txt")
        log = max(logs, key=lambda file: file.stat().st_mtime).read_text(encoding="utf-8")
        corpus, groups = self.read(), loss_by_group(log)
        expected = expected_groups((corpus.sources[number].name for number in corpus.source), corpus.spacing)
        self.results.put(
            key,
            {
                "minutes": self.minutes,
                "cores": self.options.threads,
                **totals([stage]),
                "memory": watch.peaks(),
                "groups": groups,
                "missing": [name for name in expected if name not in groups],
                "last_epoch": last_epoch(log),
                **provenance(),
            },
        )

    def finetune(self, key: str, number: int, seed: int, minutes: float, pretraining: str) -> None:
        """Step C: one dataset, seed and arm (the last word of ``key``)."""
        dataset, configuration = self.name(number), self.targets[number]
        bench = self.bench(dataset, configuration, 0, seed, minutes)
        corpus_plans = json.loads((self.corpus.base / "UMITPlans.json").read_text(encoding="utf-8"))
        plans = plans_for(corpus_plans["configurations"]["3d_native"]["umit"]["size"])
        if dataset not in self.planned:
            bench.plan(plans, [configuration])
            self.planned.add(dataset)
        chosen = few_cases(read_fold(self.data, dataset, 0), LABELLED, VALIDATED)
        bench.set_fold(chosen)
        folder, weights, started = bench.run_folder(key), None, time.perf_counter()
        if key.endswith("/corpus"):
            model = self.corpus.model(self.corpus.folder_of(pretraining), "UMITPretrainTrainer", "UMITPlans")
            weights = str(model / "fold_all" / "checkpoint_final.pth")
        stage = bench.stage(
            folder, "finetune", "UMITTrainer", plans, minutes * 60, validate=True, pretrained_weights=weights
        )
        described = {"configuration": configuration, "seed": seed, "minutes": minutes, "labelled": chosen["train"]}
        described |= {"cores": self.options.threads, **totals([stage])}
        self.results.put(key, described | {"everything_s": time.perf_counter() - started, **provenance()})


def main(arguments: list[str] | None = None) -> None:
    """Run what is not done yet, then print the tables of all."""
    options_parser = training_parser(__doc__, MINUTES)
    add = options_parser.add_argument
    add("--finetune-minutes", type=float, default=None, help=f"of each fine-tuning (default {FINETUNE_MINUTES:g})")
    add("--seed", type=int, action="append", help="fine-tune with this seed only (may be repeated; default: 1 and 2)")
    options = options_parser.parse_args(arguments)
    minutes = budget(options.minutes, options.quick, MINUTES)
    tuning = budget(options.finetune_minutes, options.quick, FINETUNE_MINUTES)
    settings = unusual(options_parser, options, "threads", "device")
    results = Results.of(options, "corpus_transfer", CLAIM, settings)
    mode = "quick" if options.quick else "full"
    built, pretraining = f"{mode}/corpus", f"{mode}/corpus/{minutes:.3g}min"
    prefix = f"{mode}/{minutes:.3g}min+{tuning:.3g}min/"
    seeds = options.seed or ([1] if options.quick else [1, 2])
    with alone_in(work_folder(options.work)):
        transfer = Transfer(options, results, minutes)
        transfer.build(built)
        if results.left(pretraining):
            say(f"{pretraining} ...")
            transfer.pretrain(pretraining)
        for number in transfer.targets:
            for seed in seeds:
                for arm in ARMS:
                    key = f"{prefix}{transfer.name(number)}/seed{seed}/{arm}"
                    if results.left(key):
                        say(f"{key} ...")
                        transfer.finetune(key, number, seed, tuning, pretraining)
    say(report(results.runs, pretraining, prefix))
    say(f"{LABELLED} labelled cases, {options.threads} cores, {tuning:.3g} minutes of fine-tuning each.")
    say("The corpus holds the images of the validation cases as well, without their labels.")
    say(f"Results: {results.path.name} in the results folder")


if __name__ == "__main__":
    main()
