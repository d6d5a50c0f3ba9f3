"""Train one nnU-Net trainer for a fixed wall time, in a process of its own.

``python -m benchmarks.budgeted_training JOB.json`` is what equal_time.py starts. The trainer class is used
as it is, under its own name; a mix-in adds a clock and fits the schedule to it:

- the clock runs from the first ``on_epoch_start`` to the last ``on_epoch_end``: training steps with data loading and
  augmentation, and one online-validation step an epoch. Imports, preprocessing, start of the loaders and the final
  validation are outside. Checkpoints and ``progress.png`` are written after the last epoch only, for every arm;
- the number of epochs is fixed beforehand. At the start of each epoch its number of iterations is set so that the
  remaining epochs share the remaining time equally. Schedules go by the epoch (stock trainers) or by the epoch and the
  fraction of it that is done (UMIT), so the learning rate reaches its end when the budget does, on a busy machine too.

``probe`` jobs run a few steps to find the time of one step, and train nothing that is kept. Weights may be kept on the
way (``keep_at_s``), with the clock stopped, and validated after the training (``curve_cases``).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import code_version, date_now, say, write_json

PROBE_STEPS = 3  # of each of its two epochs, or more where they fit; the faster epoch counts
NEVER = 1_000_000_000
_PROC = Path("/proc")


def cpu_seconds() -> float:
    """CPU seconds of this process, of its ended children and (where /proc exists) of its running ones."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    for child in multiprocessing.active_children():
        stat = _PROC / str(child.pid) / "stat"
        if stat.is_file():
            fields = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def iterations_that_fit(remaining_s: float, remaining_epochs: int, step_s: float, overhead_s: float) -> int:
    """Training steps of the coming epoch if the remaining time is shared equally by the remaining epochs, at least 1.

    Args:
        remaining_s: budget not yet used.
        remaining_epochs: epochs to come, the coming one included.
        step_s: seconds of one training step, data loading included.
        overhead_s: seconds of an epoch beside its training steps (online validation, logging).
    """
    return max(1, round((remaining_s / max(remaining_epochs, 1) - overhead_s) / max(step_s, 1e-6)))


class BudgetMixin:
    """Clock and fitting of iterations, put in front of any nnU-Net trainer class. See the module docstring."""

    # of the trainer behind it
    current_epoch: int
    num_epochs: int
    num_iterations_per_epoch: int
    step_in_epoch: int = 0
    optimizer: Any
    lr_scheduler: Any
    logger: Any
    output_folder: str

    # set by `budgeted` on the class; nnU-Net's constructor must keep its five arguments
    budget_s: float = 0.0
    probe: bool = False
    step_s: float = 1.0
    overhead_s: float = 0.0
    final_validation_cases: int | None = None
    keep_at_s: tuple[float, ...] = ()

    _started: float | None = None
    _cpu_started = 0.0
    _steps_done = 0  # training steps before the present epoch

    def initialize(self) -> None:
        super().initialize()  # type: ignore[misc]
        if hasattr(self.lr_scheduler, "factor"):  # UMIT sets the learning rate before each step
            self.lr_scheduler.step = self._set_learning_rate

    def _set_learning_rate(self, iteration: int) -> float:
        """UMIT's schedule at the fraction of the training that is done, since the number of iterations is not fixed."""
        factor = self.lr_scheduler.factor(self.epochs_done() / self.num_epochs * self.lr_scheduler.total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return factor

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step; of a stock trainer with the learning rate of its moment.

        nnU-Net sets it once an epoch. With a thousand epochs that is a smooth curve; with the 4 to 40 that fit here a
        warm-up would be over after the first, and the last one would still run at up to a third of the first rate.
        """
        if not hasattr(self.lr_scheduler, "factor"):
            from nnunetv2.training.lr_scheduler.warmup import Lin_incr_LRScheduler

            rises = isinstance(self.lr_scheduler, Lin_incr_LRScheduler)  # it adds one epoch to what it is told
            self.lr_scheduler.step(self.epochs_done() - 1 if rises else self.epochs_done())
            self.step_in_epoch += 1
        return dict(super().train_step(batch))  # type: ignore[misc]

    def epochs_done(self) -> float:
        """Epochs behind the middle of the coming step."""
        return self.current_epoch + (self.step_in_epoch + 0.5) / self.num_iterations_per_epoch

    def iteration(self) -> int:
        """UMIT's count of steps over the whole training, where epochs differ in length."""
        return self._steps_done + self.step_in_epoch

    def batches_in_all(self) -> int:
        """UMIT's stream of batches ends with the planned number; what fits is not known beforehand."""
        return NEVER

    def draw(self) -> None:
        """UMIT's pictures: after the last epoch only."""

    def on_train_start(self) -> None:
        super().on_train_start()  # type: ignore[misc]
        self.disable_checkpointing = True
        self._draw_progress = self.logger.plot_progress_png
        self.logger.plot_progress_png = lambda folder: None
        self.report: dict[str, Any] = {"epochs": [], "learning_rates": [], "kept": []}

    def on_epoch_start(self) -> None:
        now = time.perf_counter()
        if self._started is None:
            self._started, self._cpu_started = now, cpu_seconds()
        remaining_epochs = self.num_epochs - self.current_epoch
        remaining_s = self.budget_s - (now - self._started)
        fitting = iterations_that_fit(remaining_s, remaining_epochs, self.step_s, self.overhead_s)
        if self.probe:
            fitting = PROBE_STEPS if self.current_epoch == 0 else max(fitting, PROBE_STEPS)
        self.num_iterations_per_epoch = fitting
        self._epoch_started = now
        super().on_epoch_start()  # type: ignore[misc]

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()  # type: ignore[misc]
        self._steps_started = time.perf_counter()

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        steps_s = time.perf_counter() - self._steps_started
        self.step_s = steps_s / len(train_outputs)
        self._steps = (len(train_outputs), steps_s)
        self._steps_done += len(train_outputs)
        self.step_in_epoch = 0
        super().on_train_epoch_end(train_outputs)  # type: ignore[misc]

    def on_epoch_end(self) -> None:
        super().on_epoch_end()  # type: ignore[misc]
        now = time.perf_counter()
        iterations, steps_s = self._steps
        self.overhead_s = now - self._epoch_started - steps_s
        self.report["epochs"].append({"iterations": iterations, "steps_s": steps_s, "overhead_s": self.overhead_s})
        groups = self.optimizer.param_groups
        self.report["learning_rates"].append(float(max(group["lr"] for group in groups)))
        if self._started is not None:
            self.report["wall_s"] = now - self._started
            self.report["cpu_s"] = cpu_seconds() - self._cpu_started
            self._keep(now, now - self._started)

    def _keep(self, now: float, elapsed_s: float) -> None:
        """Write a checkpoint if one is due; the clock stands meanwhile."""
        waiting = tuple(at for at in self.keep_at_s if at > elapsed_s)
        if len(waiting) == len(self.keep_at_s) or self._started is None:
            return
        self.keep_at_s = waiting
        file = Path(self.output_folder) / f"checkpoint_after_{elapsed_s:.0f}s.pth"
        self.disable_checkpointing = False
        self.save_checkpoint(str(file))  # type: ignore[attr-defined]
        self.disable_checkpointing = True
        self.report["kept"].append({"wall_s": elapsed_s, "checkpoint": str(file)})
        self._started += time.perf_counter() - now

    def on_train_end(self) -> None:
        self.disable_checkpointing = self.probe
        self.logger.plot_progress_png = self._draw_progress
        super().on_train_end()  # type: ignore[misc]
        if not self.probe:
            self.logger.plot_progress_png(self.output_folder)

    def do_split(self) -> tuple[list[str], list[str]]:
        training, validation = super().do_split()  # type: ignore[misc]
        if self.final_validation_cases is not None:
            validation = sorted(validation)[: self.final_validation_cases]
        return training, validation


def budgeted(trainer: type, **settings: Any) -> type:
    """``trainer`` with the clock in front; the name stays, so folders and checkpoints look as nnU-Net wrote them."""
    return type(trainer.__name__, (BudgetMixin, trainer), {"__module__": __name__, **settings})


def build_trainer(job: dict[str, Any]) -> Any:
    """The trainer that ``job`` names, with the clock, initialised."""
    import torch
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    base = Path(os.environ["nnUNet_preprocessed"]) / job["dataset"]
    plans = json.loads((base / f"{job['plans']}.json").read_text(encoding="utf-8"))
    dataset = json.loads((base / "dataset.json").read_text(encoding="utf-8"))
    plans["continue_training"] = False
    trainer_class = budgeted(
        recursive_find_trainer_class_by_name(job["trainer"]),
        budget_s=job["budget_s"],
        probe=job["probe"],
        step_s=job["step_s"],
        overhead_s=job["overhead_s"],
        final_validation_cases=job["validation_cases"],
        keep_at_s=tuple(job["keep_at_s"]),
    )
    trainer = trainer_class(plans, job["configuration"], job["fold"], dataset, torch.device(job["device"]))
    trainer.num_epochs = job["epochs"]
    trainer.num_val_iterations_per_epoch = 1
    if hasattr(trainer, "warmup_duration_whole_net"):  # stock: 50 of 1000 epochs
        trainer.warmup_duration_whole_net = max(1, round(0.05 * job["epochs"]))
    trainer.initialize()
    return trainer


def train(trainer: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Train for the budget; returns times, iterations and where the last checkpoint lies."""
    from nnunetv2.run.run_training import maybe_load_checkpoint

    maybe_load_checkpoint(trainer, False, False, job["pretrained_weights"])
    trainer.run_training()
    report: dict[str, Any] = dict(trainer.report)
    epochs = report.pop("epochs")
    if job["pretrained_weights"] is not None:
        report["arrived"] = trainer.describe_transfer()["fraction"]
    return report | {
        "trainer": job["trainer"],
        "plans": job["plans"],
        "trained": {"date": date_now(), "code": code_version()},
        "augmentation": getattr(trainer, "augmentation", None),  # of UMITTrainer, where the plans leave it open
        "epochs": len(epochs),
        "iterations": sum(epoch["iterations"] for epoch in epochs),
        "iterations_of_epochs": [epoch["iterations"] for epoch in epochs],
        "steps_s": sum(epoch["steps_s"] for epoch in epochs),
        "overhead_s": sum(epoch["overhead_s"] for epoch in epochs),
        "batch_size": int(trainer.batch_size),
        "patch_size": [int(size) for size in trainer.configuration_manager.patch_size],
        "parameters": sum(parameter.numel() for parameter in trainer.network.parameters()),
        "train_losses": [float(loss) for loss in trainer.logger.get_value("train_losses", step=None)],
        "step_s": min(epoch["steps_s"] / epoch["iterations"] for epoch in epochs),
        "last_overhead_s": epochs[-1]["overhead_s"],
        "checkpoint": str(Path(trainer.output_folder) / "checkpoint_final.pth"),
        "finished": not job["validate"],
    }


def load_trained(trainer: Any, checkpoint: str) -> None:
    """Weights and mirroring axes of a finished training (stock Primus fails to load its own checkpoints)."""
    import torch

    content = torch.load(checkpoint, map_location="cpu", weights_only=False)  # written by this very benchmark
    getattr(trainer.network, "_orig_mod", trainer.network).load_state_dict(content["network_weights"])  # if compiled
    trainer.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]


def draw_curve(trainer: Any, report: dict[str, Any], cases: int) -> list[dict[str, Any]]:
    """Dice without mirroring on the first validation cases, for the weights that were kept and the last ones."""
    limit = trainer.final_validation_cases
    trainer.final_validation_cases = cases if limit is None else min(cases, limit)
    points = []
    for each in [*report["kept"], {"wall_s": report["wall_s"], "checkpoint": report["checkpoint"]}]:
        load_trained(trainer, each["checkpoint"])
        trainer.inference_allowed_mirroring_axes = None
        points.append({"wall_s": each["wall_s"], "dice": validate(trainer)["dice"]})
    trainer.final_validation_cases = limit
    load_trained(trainer, report["checkpoint"])
    return points


def validate(trainer: Any) -> dict[str, Any]:
    """Final validation: its time, and Dice, or the figures of a training without labels."""
    folder = Path(trainer.output_folder) / "validation"
    shutil.rmtree(folder, ignore_errors=True)  # nnU-Net scores every file in it, those of an earlier call too
    started = time.perf_counter()
    trainer.perform_actual_validation(False)
    summary = folder / "summary.json"
    content = json.loads(summary.read_text(encoding="utf-8"))
    if "foreground_mean" in content:
        found = {"dice": read_dice(summary)}
    else:
        kept = {name: content[name] for name in ("mean", "pooled")}
        found = {"figures": kept | {"cases": len(content["metric_per_case"])}}
    return {"validation_s": time.perf_counter() - started, **found, "finished": True}


def read_dice(summary: Path) -> dict[str, Any]:
    """Mean foreground Dice, Dice of each class and number of cases out of nnU-Net's ``summary.json``."""
    content = json.loads(summary.read_text(encoding="utf-8"))
    return {
        "mean": content["foreground_mean"]["Dice"],
        "per_class": {label: figures["Dice"] for label, figures in content["mean"].items()},
        "cases": len(content["metric_per_case"]),
    }


def main() -> None:
    """Run the job. The report is written after the training and after the validation: a kill costs one of them."""
    import numpy as np
    import torch

    code_version()  # of what is imported now
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    random.seed(job["seed"])
    np.random.seed(job["seed"])
    torch.manual_seed(job["seed"])
    torch.set_num_threads(job["threads"])
    trainer, path = build_trainer(job), Path(job["report"])
    torch.backends.cudnn.benchmark = trainer.device.type == "cuda"  # as nnUNetv2_train sets it
    if path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
        load_trained(trainer, report["checkpoint"])
    else:
        report = train(trainer, job)
        write_json(path, report)
    say(f"{job['trainer']}: {report['iterations']} iterations in {report['wall_s']:.1f} s of training wall time")
    if not report["finished"]:
        curve = {"curve": draw_curve(trainer, report, job["curve_cases"])} if job["curve_cases"] else {}
        write_json(path, report | curve | validate(trainer))


if __name__ == "__main__":
    main()
