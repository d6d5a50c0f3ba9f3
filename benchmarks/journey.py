"""The journey with stock commands on real data: plan, pre-train (killed and continued), fine-tune, predict, score.

    python -m benchmarks.journey --full [--dataset 4 --dataset 27 ...] [--work FOLDER] [--device cuda]

Planned and preprocessed are datasets 4, 27, 120, 122, 123, 124 and 125, or those that are named; trained, with budgets
of a few steps, are 4 (isotropic), 27 (anisotropic), 122 (two channels) and 124 (2D). For each of them: pre-training in
one go; the same killed with SIGKILL in the middle and continued with ``--c`` (on a CPU, loss curves and weights must
agree bit for bit; on a GPU, whose sums have no fixed order, the curves must within 2 %); fine-tuning of fold 0 from it;
``--val --npz``; prediction; evaluation. For 4 also find_best_configuration against a nnU-Net of its own plans (a few
steps), ensemble, and export and import. Then soft tokens on 4, 27 and 120 (2D): tokenizer, soft-token pre-training and
fine-tuning, each also killed and continued. Whatever is done is not done again.

Claim: every stock command of the journey works. Nothing here measures accuracy.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    REPOSITORY,
    Results,
    add_place,
    data_root,
    parser,
    process_counts,
    provenance,
    say,
    table,
    unusual,
    work_folder,
    write_json,
)
from nnunet_umit.cli.stock import find_command

CLAIM = "plan, pre-train, kill, continue, fine-tune, predict and evaluate work with stock commands on real data"
PLANNED = (4, 27, 120, 122, 123, 124, 125)
TRAINED = {4: "3d_fullres", 27: "3d_fullres", 122: "3d_fullres", 124: "2d"}
SOFT_TOKENS = {4: "3d_fullres", 27: "3d_fullres", 120: "2d"}
CONFIGURATIONS = TRAINED | SOFT_TOKENS
GPU_TOLERANCE = 0.02  # of a loss: what the order of sums changes in a few steps, with room
VALIDATED = 8  # cases of fold 0: nothing here measures accuracy
BUDGET = {"epochs": 3, "iterations_per_epoch": 4, "val_iterations_per_epoch": 1}
GPU_ITERATIONS = 200  # an epoch, so that a training on a GPU is still in it when it is killed
SHORT_TRAINER = '''"""nnU-Net's own trainer, a few steps long."""
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerShort(nnUNetTrainer):
    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1
        super().initialize()
'''


class Journey:
    """Folders, commands and the list of what ran."""

    def __init__(self, work: Path, results: Results, device: str = "cpu", threads: int = 2) -> None:
        self.data = data_root()
        self.device = device
        self.threads = threads
        self.work = work
        self.results = results
        self.preprocessed = work / "nnUNet_preprocessed"
        self.shim = work / "trainers"
        self.shim.mkdir(parents=True, exist_ok=True)
        (self.shim / "short_trainer.py").write_text(SHORT_TRAINER, encoding="utf-8")

    def environment(self, results: str) -> dict[str, str]:
        return os.environ | {
            "nnUNet_raw": str(self.data),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.work / results),
            "nnUNet_extTrainer": str(self.shim),
            "PYTHONUNBUFFERED": "1",  # a log is read while it is written
            **process_counts(self.threads),
        }

    def run(self, key: str, *words: str | Path, results: str = "results", again: bool = False) -> None:
        """Run one command once; its wall time goes into the results, its output into a log."""
        if not again and not self.results.left(key):
            return
        began = time.monotonic()
        log = self.log(key)
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                self.words(*words), env=self.environment(results), stdout=file, stderr=subprocess.STDOUT
            )
        if done.returncode:
            raise RuntimeError(f"{key} ended with {done.returncode}:\n{tail(log)}")
        self.note(key, " ".join(map(str, words)), began)

    def words(self, *words: str | Path) -> list[str]:
        return [str(find_command(str(words[0]))), *map(str, words[1:])]

    def log(self, key: str) -> Path:
        folder = self.work / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / (key.replace("/", "_") + ".log")

    def note(self, key: str, command: str, began: float, **more: Any) -> None:
        wall = time.monotonic() - began
        shown = command.replace(str(self.work), "WORK").replace(str(self.data), "DATA")
        self.results.put(key, {"command": shown, "wall_s": wall, **more, **provenance()})
        say(f"{key}: {wall:.0f} s")

    def folder(self, dataset: int) -> Path:
        return next(self.data.glob(f"Dataset{dataset:03d}_*"))

    def model(self, dataset: int, trainer: str, results: str = "results") -> Path:
        name = f"{trainer}__UMITPlans__{CONFIGURATIONS[dataset]}"
        return self.work / results / self.folder(dataset).name / name

    def plan(self, datasets: Sequence[int]) -> None:
        """Plan and preprocess what is missing, put the grouped splits in place, set small budgets."""
        bases = {dataset: self.preprocessed / self.folder(dataset).name for dataset in datasets}
        missing = [str(dataset) for dataset, base in bases.items() if not (base / "UMITPlans.json").is_file()]
        if missing:
            key = "plan" if len(missing) == len(PLANNED) else f"plan {' '.join(missing)}"
            planning = ["nnUNetv2_plan_and_preprocess", "-d", *missing, "-pl", "UMITPlanner"]
            processes = str(self.threads)
            self.run(key, *planning, "-np", processes, "-npfp", processes, again=True)  # stored: another work folder
        budget = BUDGET if self.device == "cpu" else BUDGET | {"iterations_per_epoch": GPU_ITERATIONS}
        for base in bases.values():
            split = json.loads((self.data / "splits" / f"{base.name}.json").read_text(encoding="utf-8"))[0]
            write_json(base / "splits_final.json", [{"train": split["train"], "val": sorted(split["val"])[:VALIDATED]}])
            plans = json.loads((base / "UMITPlans.json").read_text(encoding="utf-8"))
            for configuration in plans["configurations"].values():
                for section in ("pretrain", "tokenizer", "finetune"):
                    configuration["umit"].setdefault(section, {}).update(budget)
            write_json(base / "UMITPlans.json", plans)

    def train(self, step: str, dataset: int, trainer: str, fold: str, weights: Path | None, results: str) -> Path:
        """One unbroken training, and one that is killed in the middle and continued: both must give the same.

        Args:
            step: what the training is called in the results.
            results: folder of the unbroken one.

        Returns:
            The final checkpoint of the unbroken training.
        """
        base = ["nnUNetv2_train", str(dataset), CONFIGURATIONS[dataset], fold, "-device", self.device]
        base += ["-tr", trainer, "-p", "UMITPlans"]
        start = base if weights is None else [*base, "-pretrained_weights", str(weights)]
        self.run(f"{dataset}/{step}", *start, results=results)
        final = self.model(dataset, trainer, results) / f"fold_{fold}" / "checkpoint_final.pth"
        key = f"{dataset}/{step} killed and continued"
        if not self.results.left(key):
            return final
        began, killed = time.monotonic(), "killed" if results == "results" else f"{results}_killed"
        folder = self.model(dataset, trainer, killed) / f"fold_{fold}"
        shutil.rmtree(folder, ignore_errors=True)
        epoch = self.kill(key, start, folder, killed)
        with self.log(key).open("a", encoding="utf-8") as file:
            done = subprocess.run(
                self.words(*base, "--c"), env=self.environment(killed), stdout=file, stderr=subprocess.STDOUT
            )
        if done.returncode:
            raise RuntimeError(f"--c ended with {done.returncode}:\n{tail(self.log(key))}")
        whole, broken = load(final), load(folder / "checkpoint_final.pth")
        found = difference(whole, broken, exact=self.device == "cpu")
        curve = broken["logging"]["train_losses"]
        self.note(key, " ".join(base) + " --c", began, killed_in_epoch=epoch, losses=curve, **found)
        return final

    def kill(self, key: str, command: list[str], fold: Path, results: str) -> int:
        """Start a training and SIGKILL it some moments after its first epoch; returns the epoch it had reached."""
        with self.log(key).open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                self.words(*command),
                env=self.environment(results),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while process.poll() is None and "Epoch 1" not in read(self.log(key)):
            time.sleep(0.05)
        if self.device == "cpu":
            time.sleep(random.Random(key).uniform(0.0, 2.0))
        if process.poll() is not None:
            raise RuntimeError(
                f"{key} ended with {process.returncode} before it could be killed:\n{tail(self.log(key))}"
            )
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (fold / "checkpoint_final.pth").exists():
            raise RuntimeError(f"{key}: the training ended before it could be killed; raise the budget")
        return read(self.log(key)).count("Epoch time")

    def pretrain(self, dataset: int) -> None:
        """Masked pre-training."""
        self.train("pretrain", dataset, "UMITPretrainTrainer", "all", None, "results")

    def soft_tokens(self, dataset: int) -> None:
        """Tokenizer, pre-training on its tokens, and fine-tuning of fold 0 from that."""
        tokenizer = self.train("tokenizer", dataset, "UMITTokenizerTrainer", "all", None, "soft")
        encoder = self.train("soft tokens", dataset, "UMITSoftTokenPretrainTrainer", "all", tokenizer, "soft")
        self.train("soft finetune", dataset, "UMITTrainer", "0", encoder, "soft")

    def finetune(self, dataset: int) -> None:
        """Fine-tune fold 0 from the pre-training, validate again with softmax files, predict two images, evaluate."""
        configuration, name = TRAINED[dataset], self.folder(dataset).name
        base = ["nnUNetv2_train", str(dataset), configuration, "0", "-tr", "UMITTrainer", "-p", "UMITPlans"]
        weights = self.model(dataset, "UMITPretrainTrainer") / "fold_all" / "checkpoint_final.pth"
        base += ["-device", self.device]
        self.run(f"{dataset}/finetune", *base, "-pretrained_weights", weights)
        self.run(f"{dataset}/validate", *base, "--val", "--npz")
        images, labels = self.work / "in" / name, self.work / "truth" / name
        self.some_cases(dataset, images, labels)
        out = self.work / "out" / name
        model = ["-d", str(dataset), "-c", configuration, "-f", "0", "-tr", "UMITTrainer", "-p", "UMITPlans"]
        self.run(
            f"{dataset}/predict", "nnUNetv2_predict", *model, "-i", images, "-o", out, "-device", self.device,
            "-npp", "1", "-nps", "1", "--save_probabilities",
        )  # fmt: skip
        fold = self.model(dataset, "UMITTrainer")
        self.run(
            f"{dataset}/evaluate", "nnUNetv2_evaluate_folder", labels, out,
            "-djfile", fold / "dataset.json", "-pfile", fold / "plans.json",
        )  # fmt: skip

    def some_cases(self, dataset: int, images: Path, labels: Path) -> None:
        """Link the first two validation cases of fold 0."""
        source = self.folder(dataset)
        split = json.loads((self.data / "splits" / f"{source.name}.json").read_text(encoding="utf-8"))
        for folder in (images, labels):
            folder.mkdir(parents=True, exist_ok=True)
        for case in split[0]["val"][:2]:
            files = [(f, images) for f in (source / "imagesTr").glob(f"{case}_[0-9][0-9][0-9][0-9].*")]
            files += [(f, labels) for f in (source / "labelsTr").glob(f"{case}.*")]
            for file, folder in files:
                if not (folder / file.name).exists():
                    (folder / file.name).symlink_to(file)

    def compare(self) -> None:
        """Dataset 4 only: best configuration against nnU-Net's own plans, ensemble, export and import."""
        self.run("4/stock plan", "nnUNetv2_plan_experiment", "-d", "4")
        processes = str(self.threads)
        self.run("4/stock preprocess", "nnUNetv2_preprocess", "-d", "4", "-c", "3d_fullres", "-np", processes)
        stock = ["nnUNetv2_train", "4", "3d_fullres", "0", "-device", self.device, "--npz"]
        self.run("4/stock train", *stock, "-tr", "nnUNetTrainerShort")
        for name in ("UMITTrainer__UMITPlans", "nnUNetTrainerShort__nnUNetPlans"):
            trained = (self.work / "results" / self.folder(4).name / f"{name}__3d_fullres" / "fold_0").is_dir()
            if self.results.left("4/find best") and not trained:  # stored: of another work folder
                raise RuntimeError(f"{name} was not trained")
        self.run(
            "4/find best", "nnUNetv2_find_best_configuration", "4", "-p", "UMITPlans", "nnUNetPlans",
            "-tr", "UMITTrainer", "nnUNetTrainerShort", "-c", "3d_fullres", "-f", "0", "-np", processes,
        )  # fmt: skip
        name = self.folder(4).name
        stock_out = self.work / "out_stock" / name
        self.run(
            "4/stock predict", "nnUNetv2_predict", "-d", "4", "-c", "3d_fullres", "-f", "0",
            "-tr", "nnUNetTrainerShort", "-i", self.work / "in" / name, "-o", stock_out, "-device", self.device,
            "-npp", "1", "-nps", "1", "--save_probabilities",
        )  # fmt: skip
        self.run(
            "4/ensemble", "nnUNetv2_ensemble", "-i", self.work / "out" / name, stock_out,
            "-o", self.work / "ensemble", "-np", processes,
        )  # fmt: skip
        archive = self.work / "model.zip"
        self.run(
            "4/export", "nnUNetv2_export_model_to_zip", "-d", "4", "-o", archive, "-c", "3d_fullres",
            "-tr", "UMITTrainer", "-p", "UMITPlans", "-f", "0",
        )  # fmt: skip
        self.run("4/import", "nnUNetv2_install_pretrained_model_from_zip", archive, results="imported")
        self.run(
            "4/predict imported", "nnUNetv2_predict", "-d", "4", "-c", "3d_fullres", "-f", "0", "-tr", "UMITTrainer",
            "-p", "UMITPlans", "-i", self.work / "in" / name, "-o", self.work / "out_imported",
            "-device", self.device, "-npp", "1", "-nps", "1", results="imported",
        )  # fmt: skip


def difference(whole: dict[str, Any], broken: dict[str, Any], exact: bool) -> dict[str, float | bool]:
    """Largest relative difference of the loss curves of two checkpoints, and whether all weights are equal.

    Args:
        exact: curves and weights must be equal to the last bit; else curves within ``GPU_TOLERANCE``.

    Raises:
        RuntimeError: they differ by more.
    """
    largest = 0.0
    for curve in ("train_losses", "val_losses"):
        one, other = whole["logging"][curve], broken["logging"][curve]
        apart = [abs(a - b) / max(abs(a), 1e-12) for a, b in zip(one, other, strict=True)]
        if not all(each <= (0.0 if exact else GPU_TOLERANCE) for each in apart):
            raise RuntimeError(f"{curve} differ: {one} and {other}")
        largest = max(largest, *apart)
    same = all(torch.equal(v, broken["network_weights"][k]) for k, v in whole["network_weights"].items())
    if exact and not same:
        raise RuntimeError("the loss curves agree, the weights do not")
    return {"largest_difference": largest, "weights_equal": same}


def load(path: Path) -> dict[str, Any]:
    """A checkpoint, read without executing code."""
    return torch.load(path, map_location="cpu", weights_only=True)


def read(log: Path) -> str:
    """A log so far."""
    return log.read_text(encoding="utf-8", errors="replace")


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(read(log).splitlines()[-25:])


def main(arguments: list[str] | None = None) -> None:
    """Run what is not done yet, then print the table."""
    options_parser = parser(__doc__)
    add = options_parser.add_argument
    add("--dataset", type=int, action="append", choices=sorted(CONFIGURATIONS), help="default: all")
    add_place(options_parser)
    options = options_parser.parse_args(arguments)
    results = Results.of(options, "journey", CLAIM, unusual(options_parser, options, "device"))
    work = work_folder(options.work) / "journey"
    journey = Journey(work, results, options.device, options.threads)
    journey.plan(options.dataset or ((4,) if options.quick else PLANNED))
    chosen = options.dataset or ([4] if options.quick else sorted(CONFIGURATIONS))
    for dataset in chosen:
        if dataset in TRAINED:
            journey.pretrain(dataset)
            journey.finetune(dataset)
        if dataset in SOFT_TOKENS:
            journey.soft_tokens(dataset)
    if 4 in chosen:
        journey.compare()
    rows = [[key, f"{run['wall_s']:.0f}", run["command"][:90]] for key, run in results.runs.items()]
    say(table(["step", "wall s", "command"], rows))
    say(f"Results: {results.path.relative_to(REPOSITORY) if results.path.is_relative_to(REPOSITORY) else results.path}")


if __name__ == "__main__":
    main()
