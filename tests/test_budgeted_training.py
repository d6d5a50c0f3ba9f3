"""The clock in front of a trainer: budget, schedules, and what is kept and scored on the way; nothing is trained."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.lr_scheduler.warmup import Lin_incr_LRScheduler, PolyLRScheduler_offset

from benchmarks import budgeted_training


@pytest.mark.parametrize(
    ("remaining_s", "epochs", "step_s", "overhead_s", "expected"),
    [(100.0, 10, 1.0, 0.0, 10), (100.0, 10, 1.0, 2.0, 8), (1.0, 10, 5.0, 0.0, 1), (-3.0, 1, 1.0, 0.0, 1)],
)
def test_iterations_that_fit(remaining_s, epochs, step_s, overhead_s, expected):
    assert budgeted_training.iterations_that_fit(remaining_s, epochs, step_s, overhead_s) == expected


class FakeClock:
    """Stands in for ``time`` in budgeted_training: seconds pass only where the fake trainer says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class FakeSchedule:
    total = 50

    def __init__(self) -> None:
        self.positions: list[float] = []

    def factor(self, position: float) -> float:
        self.positions.append(position)
        return 1 - position / self.total

    def step(self, iteration: int) -> float:
        raise AssertionError("the benchmark must have replaced this")


class FakeLogger:
    def plot_progress_png(self, folder: str) -> None:
        self.drawn_in = folder


class FakeTrainer:
    """nnU-Net's loop around steps of 1 s that become 3 s in the middle (a noisy neighbour), and epoch ends of 0.5 s."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.current_epoch, self.num_epochs, self.num_iterations_per_epoch = 0, 10, 1
        self.logger, self.output_folder, self.disable_checkpointing = FakeLogger(), "folder", False
        self.lr_scheduler, self.step_in_epoch = FakeSchedule(), 0
        self.optimizer = argparse.Namespace(param_groups=[{"lr": 1.0, "base_lr": 1.0}])
        self.saved: list[str] = []

    def save_checkpoint(self, file: str) -> None:
        assert not self.disable_checkpointing
        self.clock.now += 7.0
        self.saved.append(Path(file).name)

    def initialize(self) -> None: ...

    def on_train_start(self) -> None: ...

    def on_epoch_start(self) -> None: ...

    def on_train_epoch_start(self) -> None:
        self.step_in_epoch = 0

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.lr_scheduler.step(self.iteration())
        self.clock.now += 3.0 if 4 <= self.current_epoch < 7 else 1.0
        self.step_in_epoch += 1
        return {}

    def on_train_epoch_end(self, outputs: list[Any]) -> None: ...

    def on_epoch_end(self) -> None:
        assert self.disable_checkpointing, "no checkpoint inside the clock"
        self.clock.now += 0.5
        self.current_epoch += 1

    def on_train_end(self) -> None:
        assert not self.disable_checkpointing, "the last checkpoint is written"

    def run(self) -> None:
        self.initialize()
        self.on_train_start()
        for _ in range(self.num_epochs):
            self.on_epoch_start()
            self.on_train_epoch_start()
            self.on_train_epoch_end([self.train_step({}) for _ in range(self.num_iterations_per_epoch)])
            self.on_epoch_end()
        self.on_train_end()


def test_training_ends_with_the_budget_and_so_does_the_schedule(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(budgeted_training, "time", clock)
    trainer_class = budgeted_training.budgeted(
        FakeTrainer, budget_s=200.0, step_s=1.0, overhead_s=0.0, keep_at_s=(50.0, 55.0, 150.0)
    )
    assert trainer_class.__name__ == "FakeTrainer", "nnU-Net's folders and checkpoints carry the class name"
    trainer: Any = trainer_class(clock)
    schedule = trainer.lr_scheduler
    started = clock.now
    trainer.run()
    assert trainer.report["wall_s"] == pytest.approx(200.0, rel=0.03)
    assert clock.now - started == pytest.approx(trainer.report["wall_s"] + 2 * 7.0), "what is kept costs no budget"
    iterations = [epoch["iterations"] for epoch in trainer.report["epochs"]]
    assert len(iterations) == 10 and iterations[5] < iterations[0] / 2
    assert schedule.positions == sorted(schedule.positions)
    assert schedule.positions[0] < 0.3 and schedule.total - schedule.positions[-1] < 0.3
    assert trainer.logger.drawn_in == "folder"
    kept = trainer.report["kept"]
    assert [each["wall_s"] for each in kept] == pytest.approx([60.0, 160.0], abs=10), "at the ends of epochs"
    assert trainer.saved == [Path(each["checkpoint"]).name for each in kept], "and the clock stood meanwhile"


class FakeStock(FakeTrainer):
    """As nnU-Net does it: the rate is set once an epoch, and a warm-up has a schedule of its own."""

    WARM_UP = 2

    def initialize(self) -> None:
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        self.lr_scheduler = Lin_incr_LRScheduler(self.optimizer, 1.0, self.WARM_UP)
        self.rates: list[float] = []

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.WARM_UP:
            self.lr_scheduler = PolyLRScheduler_offset(self.optimizer, 1.0, self.num_epochs, self.WARM_UP)
        self.lr_scheduler.step(self.current_epoch)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.clock.now += 1.0
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        return {}


def test_stock_schedules_rise_and_fall_within_epochs(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(budgeted_training, "time", clock)
    trainer: Any = budgeted_training.budgeted(FakeStock, budget_s=100.0, step_s=1.0, overhead_s=0.5)(clock)
    trainer.run()
    first, *_, last = [epoch["iterations"] for epoch in trainer.report["epochs"]]
    rates, top = trainer.rates, max(trainer.rates)
    rising = rates[: rates.index(top) + 1]
    assert rates[0] == pytest.approx(0.5 / first / 2) and rates[first] == pytest.approx(0.5 + 0.5 / first / 2, rel=0.02)
    assert rising == sorted(rising) and top > 0.97 and 17 <= len(rising) <= 22, "two of ten epochs"
    assert rates[len(rising) - 1 :] == sorted(rates[len(rising) - 1 :], reverse=True)
    assert rates[-1] == pytest.approx((0.5 / last / 8) ** 0.9)


def test_weights_of_a_compiled_training_are_read_again(tmp_path):
    module = torch.nn.Linear(2, 1)
    trainer = argparse.Namespace(network=torch.compile(module, backend="eager"))
    weights = {name: torch.ones_like(value) for name, value in module.state_dict().items()}
    torch.save({"network_weights": weights, "inference_allowed_mirroring_axes": (0,)}, tmp_path / "final.pth")
    budgeted_training.load_trained(trainer, str(tmp_path / "final.pth"))
    assert module.weight.tolist() == [[1.0, 1.0]]


def test_dice_counts_no_file_of_an_earlier_validation(tmp_path):
    class Validating:
        """Writes a file a case, and scores what is in the folder, as nnU-Net does."""

        output_folder = str(tmp_path)
        final_validation_cases: int | None = 3
        inference_allowed_mirroring_axes: Any = (0,)
        network = argparse.Namespace(load_state_dict=lambda weights: None)

        def perform_actual_validation(self, save_probabilities: bool) -> None:
            folder = tmp_path / "validation"
            folder.mkdir(exist_ok=True)
            for case in range(self.final_validation_cases or 20):
                (folder / f"{case}.nii.gz").touch()
            cases = [{} for _ in folder.glob("*.nii.gz")]
            content = {"foreground_mean": {"Dice": 0.5}, "mean": {"1": {"Dice": 0.5}}, "metric_per_case": cases}
            (folder / "summary.json").write_text(json.dumps(content))

    trainer, weights = Validating(), tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {}, "inference_allowed_mirroring_axes": (0,)}, weights)
    report = {"kept": [{"wall_s": 1.0, "checkpoint": str(weights)}], "wall_s": 2.0, "checkpoint": str(weights)}
    for limit, expected in ((None, 12), (3, 3)):
        trainer.final_validation_cases = limit
        curve = budgeted_training.draw_curve(trainer, report, 12)
        assert [point["dice"]["cases"] for point in curve] == [expected, expected]
        assert trainer.final_validation_cases == limit and trainer.inference_allowed_mirroring_axes == (0,)
        assert budgeted_training.validate(trainer)["dice"]["cases"] == (limit or 20)


def test_dice_is_read_from_a_summary(tmp_path):
    summary = {
        "foreground_mean": {"Dice": 0.5},
        "mean": {"1": {"Dice": 0.4}, "2": {"Dice": 0.6}},
        "metric_per_case": [{}],
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    dice = budgeted_training.read_dice(tmp_path / "summary.json")
    assert dice == {"mean": 0.5, "per_class": {"1": 0.4, "2": 0.6}, "cases": 1}
