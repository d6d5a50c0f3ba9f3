"""``umit demo``: the whole journey on a small data set, through nnU-Net's own commands.

Plan, pre-train on images without their labels, fine-tune twice with the labels of a few cases - from scratch and from
the pre-trained encoder -, predict held-out cases, evaluate. Each step is a stock command in a process of its own,
with a log file; nothing here trains or predicts by itself.
"""

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from nnunet_umit import __version__
from nnunet_umit.cli import demo_data, demo_report
from nnunet_umit.cli.demo_budget import EPOCHS, Budget, set_budget
from nnunet_umit.cli.demo_data import DemoData, DemoError
from nnunet_umit.cli.stock import StockCommandError, StockRunner, stock_environment

MARKER = "umit_demo.json"
CREATED = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "predictions", "logs", "demo.png", MARKER)
PLANS = "UMITPlans"
SCRATCH, PRETRAINED = "from scratch", "pre-trained"


def demo(
    dataset: Annotated[
        Path | None,
        typer.Option(help="A data set in nnU-Net's raw format, instead of virtual subjects; a few cases are used."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder that keeps everything: data, models, logs, picture.")] = Path(
        "umit_demo"
    ),
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Rough wall time on two CPU cores; sets the number of training steps.")
    ] = 5.0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
) -> None:
    """Plan, pre-train, fine-tune with and without pre-training, predict and evaluate, with stock nnU-Net commands."""
    console = Console()
    try:
        run_demo(console, dataset=dataset, out=out, minutes=minutes, device=device)
    except (DemoError, StockCommandError) as error:
        console.print(f"[bold red]umit demo:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def run_demo(console: Console, *, dataset: Path | None, out: Path, minutes: float, device: str) -> None:
    """Run every step; see ``demo`` for the arguments.

    Raises:
        DemoError: For input that the user can mend.
        StockCommandError: When a stock command fails.
    """
    device = choose_device(device)
    out = out.absolute()
    prepare_folder(out, dataset)
    runner = StockRunner(console, out / "logs", total=10)
    scale = min(1.0, minutes / 4)
    with runner.step("write the data set"):
        if dataset is None:
            data = demo_data.virtual_dataset(out / "nnUNet_raw", scale=scale)
        else:
            data = demo_data.part_of_dataset(dataset.absolute(), out / "nnUNet_raw", scale=scale)
    console.print(
        f"{escape(data.name)}: labels of {len(data.training)} cases, {len(data.validation)} for validation, "
        f"{len(data.unlabelled)} more images without labels, {len(data.test)} held out. Device {device}, about "
        f"{minutes:g} minutes on two cores. Everything goes to {escape(str(out))}",
        highlight=False,
        soft_wrap=True,
    )
    journey = _Journey(runner, data, out, device)
    journey.plan(minutes)
    weights = journey.pretrain()
    journey.finetune(SCRATCH, None)
    journey.finetune(PRETRAINED, weights)
    scores = {arm: journey.score(arm) for arm in (SCRATCH, PRETRAINED)}
    picture = out / "demo.png"
    with runner.step("draw the picture"):
        journey.draw(picture, scores)
    _report(console, journey, scores, picture)


class _Journey:
    """The commands in their order, and where each finds what the one before it left."""

    def __init__(self, runner: StockRunner, data: DemoData, out: Path, device: str) -> None:
        self.runner = runner
        self.data = data
        self.out = out
        self.device = device
        self.virtual = data.name == demo_data.VIRTUAL
        self.configuration = "2d" if _is_planar(data) else "3d_fullres"
        self.budget = Budget(pretrain_steps=0, finetune_steps=0)

    def plan(self, minutes: float) -> None:
        """Plan and preprocess, then put the small budget and the one fold into the preprocessed folder."""
        # Each worker process first imports PyTorch; for the tiny virtual subjects one is faster than two.
        options = (
            ["-np", "1", "-npfp", "1"] if self.virtual else ["-np", "2", "-npfp", "2", "--verify_dataset_integrity"]
        )
        self.runner.run(
            "plan and preprocess",
            "nnUNetv2_plan_and_preprocess",
            *("-d", self.data.identifier, "-pl", "UMITPlanner", "-c", self.configuration, *options),
            environment=self._environment("planning"),
        )
        folder = self.out / "nnUNet_preprocessed" / self.data.name
        demo_data.write_json(folder / "splits_final.json", self.data.splits())
        plans_file = folder / f"{PLANS}.json"
        plans = demo_data.read_json(plans_file)
        settings = plans["configurations"][self.configuration]
        self.budget = Budget.from_minutes(minutes, settings["batch_size"] * math.prod(settings["patch_size"]))
        set_budget(settings["umit"], self.budget)
        demo_data.write_json(plans_file, plans)

    def pretrain(self) -> Path:
        """Masked pre-training on every training image; returns the checkpoint."""
        self._train("pre-train on images only", "pretraining", "all", "UMITPretrainTrainer")
        return self._model("pretraining", "UMITPretrainTrainer") / "fold_all" / "checkpoint_final.pth"

    def finetune(self, arm: str, weights: Path | None) -> None:
        """Fine-tune on the labelled cases, from ``weights`` or from scratch."""
        options: list[str | Path] = ["-pretrained_weights", weights] if weights else []
        self._train(f"train {arm}", arm, "0", "UMITTrainer", *options)

    def score(self, arm: str) -> demo_report.Scores:
        """Predict the held-out cases with one arm and evaluate."""
        source, target = self.data.folder, self.prediction(arm)
        workers = "0" if self.virtual else "1"  # 0: in the command's own process
        model = ["-d", self.data.identifier, "-tr", "UMITTrainer", "-p", PLANS, "-c", self.configuration, "-f", "0"]
        self.runner.run(
            f"predict, {arm}",
            "nnUNetv2_predict",
            *("-i", source / "imagesTs", "-o", target),
            *model,
            *("-device", self.device, "-npp", workers, "-nps", workers),
            environment=self._environment(arm),
        )
        self.runner.run(
            f"evaluate, {arm}",
            "nnUNetv2_evaluate_folder",
            source / "labelsTs",
            target,
            *("-djfile", target / "dataset.json", "-pfile", target / "plans.json", "-np", "1"),
            environment=self._environment(arm),
        )
        return demo_report.read_scores(target / "summary.json", self.data)

    def draw(self, file: Path, scores: dict[str, demo_report.Scores]) -> None:
        """The picture of the end."""
        from nnunet_umit.cli.demo_reconstruction import reconstruct

        model = self._model("pretraining", "UMITPretrainTrainer")
        reconstruction = reconstruct(self.data, self.data.test[0], model, self.configuration)
        demo_report.draw_picture(file, self.data, {arm: self.prediction(arm) for arm in scores}, scores, reconstruction)

    def prediction(self, arm: str) -> Path:
        """Where an arm's predictions go."""
        return self.out / "predictions" / _folder_name(arm)

    def _train(self, title: str, arm: str, fold: str, trainer: str, *options: str | Path) -> None:
        self.runner.run(
            title,
            "nnUNetv2_train",
            *(self.data.identifier, self.configuration, fold, "-tr", trainer, "-p", PLANS, "-device", self.device),
            *options,
            environment=self._environment(arm),
            epochs=EPOCHS,
        )

    def _model(self, arm: str, trainer: str) -> Path:
        name = f"{trainer}__{PLANS}__{self.configuration}"
        return self.out / "nnUNet_results" / _folder_name(arm) / self.data.name / name

    def _environment(self, arm: str) -> dict[str, str]:
        """Both arms train fold 0 of the same plans, so each has an ``nnUNet_results`` of its own."""
        return stock_environment(
            self.data.raw, self.out / "nnUNet_preprocessed", self.out / "nnUNet_results" / _folder_name(arm)
        )


def choose_device(device: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes the GPU if there is one.

    Raises:
        DemoError: For another name, or ``cuda`` without a GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise DemoError(f"--device {device} is not known; choose cpu, cuda or auto")
    if device == "cpu":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise DemoError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    return "cpu"


def prepare_folder(out: Path, dataset: Path | None) -> None:
    """Make the output folder, or empty the one that an earlier demo left.

    Raises:
        DemoError: When it holds anything that no demo made.
    """
    if dataset is not None and out in (dataset.absolute(), *dataset.absolute().parents):
        raise DemoError(f"--dataset {dataset} lies in --out {out}, which the demo would clear; choose another --out")
    if out.exists() and not out.is_dir():
        raise DemoError(f"--out {out} is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise DemoError(
            f"--out {out} is not empty and was not made by umit demo ({MARKER} is missing in it). Nothing was changed; "
            "choose another --out"
        )
    try:
        for name in CREATED:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        demo_data.write_json(out / MARKER, {"made_by": "umit demo", "version": __version__})
    except OSError as error:
        raise DemoError(f"--out {out} cannot be written: {error}") from error


def _report(console: Console, journey: _Journey, scores: dict[str, demo_report.Scores], picture: Path) -> None:
    data, budget, steps = journey.data, journey.budget, journey.runner.steps
    demo_data.write_json(
        journey.out / MARKER,
        {
            "made_by": "umit demo",
            "version": __version__,
            "dataset": data.name,
            "configuration": journey.configuration,
            "device": journey.device,
            "cores": os.cpu_count(),
            "cases": {name: getattr(data, name) for name in ("training", "validation", "unlabelled", "test")},
            "steps": asdict(budget),
            "dice": json.loads(json.dumps({arm: asdict(score) for arm, score in scores.items()})),
            "seconds": {step.title: round(step.seconds, 1) for step in steps},
        },
    )
    console.print()
    console.print(demo_report.time_table(steps))
    console.print(demo_report.dice_table(scores, len(data.test)))
    images = len(data.training) + len(data.validation) + len(data.unlabelled)
    console.print(
        f"Both arms: {budget.finetune_steps} steps on the labels of {len(data.training)} cases. The pre-trained arm "
        f"had {budget.pretrain_steps} steps of masked pre-training on {images} images before. This is a demo, not a "
        f"benchmark: one short run on {len(data.test)} cases, so small differences mean nothing. {escape(data.story)}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Picture: {escape(str(picture))}\nFigures: {escape(str(journey.out / MARKER))}", highlight=False)


def _is_planar(data: DemoData) -> bool:
    """Whether nnU-Net sees single slices, for which it plans ``2d`` only."""
    volume, *_ = demo_report.load_case(data, data.test[0], {})
    return volume.shape[0] == 1


def _folder_name(arm: str) -> str:
    return arm.replace(" ", "_")
