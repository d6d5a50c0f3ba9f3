"""Both trainers in this process, on a dataset of a few thousand voxels and a network of a few thousand weights."""

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_training as tiny
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tiny_training import GEOMETRIES, Killed, curves, equal, folder_of, kill_at, log_of, weights

from nnunet_umit.architectures.transfer import load_state
from nnunet_umit.trainers import base, selfsupervised
from nnunet_umit.trainers import checkpoint as checkpoints
from nnunet_umit.trainers.checkpoint import read_checkpoint
from nnunet_umit.trainers.finetune import UMITTrainer
from nnunet_umit.trainers.guard import NonFiniteLossError
from nnunet_umit.trainers.pretrain import UMITPretrainTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
logging.getLogger("matplotlib").setLevel(logging.WARNING)


class Scaler:
    """Stands in for the scaler of float16, which only GPUs have."""

    def __init__(self, scale: float) -> None:
        self.factor = scale

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * torch.nan

    def unscale_(self, optimizer: Any) -> None:
        pass

    def step(self, optimizer: Any) -> None:
        pass

    def update(self) -> None:
        self.factor /= 2

    def get_scale(self) -> float:
        return self.factor

    def state_dict(self) -> dict[str, float]:
        return {}


def test_a_gradient_that_no_scale_makes_finite_stops_the_training(prepare: Callable[..., dict]) -> None:
    """Overflows while the scale is found are none of the images' fault, and not counted."""
    plans = prepare(pretrain={"iterations_per_epoch": 9, "max_nonfinite": 3})
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    trainer.initialize()
    trainer.grad_scaler = Scaler(4.0)
    with pytest.raises(NonFiniteLossError, match="the gradient was not finite in 3 steps in a row .* case_"):
        trainer.run_training()
    assert trainer.guard.total == 3 and trainer.iteration() == 4, "the scales 2 and 1 were not held against it"


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pretrain_then_finetune(prepare: Callable[..., dict], geometry: str) -> None:
    options = GEOMETRIES[geometry]
    plans = prepare(**options)
    pretrainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    pretrainer.run_training()
    pretrainer.perform_actual_validation()
    folder = folder_of(pretrainer)
    names = {file.name for file in folder.iterdir()}
    assert names >= {"checkpoint_final.pth", "encoder.safetensors", "card.json", "progress.png", "reconstructions.png"}
    assert not names & {checkpoints.LATEST, checkpoints.PREVIOUS}
    assert not [name for name in names if name.endswith(".part")]

    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert [row["case"] for row in summary["metric_per_case"]] == [f"case_{index:03d}" for index in range(4)]
    losses = [row["masked_loss"] for row in summary["metric_per_case"]]
    assert summary["mean"]["masked_loss"] == pytest.approx(np.mean(losses)) and 0 < np.mean(losses) < 2
    assert 0 < summary["mean"]["interpolation_loss"] <= 1.0 + 1e-6
    card = json.loads((folder / "card.json").read_text())
    assert card["licence"] == "CC0-1.0"
    assert card["spacing"] == list(options.get("spacing", (1.0, 1.0, 1.0)))
    assert card["data"]["training_cases"] == 4 and card["epochs_done"] == 2

    for source in ("checkpoint_final.pth", "encoder.safetensors"):
        trainer = tiny.make_trainer(UMITTrainer, plans)
        trainer.initialize()
        scratch = weights(trainer)
        report = trainer.network.load_umit_pretrained(str(folder / source))
        assert report.fraction == 1.0
        assert not equal(scratch, weights(trainer))
    trainer.run_training()
    stored = read_checkpoint(folder_of(trainer) / checkpoints.FINAL)
    assert stored["umit"]["transfer"]["fraction"] == 1.0
    assert "100.0 % of the encoder" in log_of(trainer)


def test_final_figures_do_not_depend_on_the_batch(prepare: Callable[..., dict]) -> None:
    """Neither through the masks nor through passes of unequal size."""
    plans, rows = prepare(), []
    for batch in (1, 2, 3):
        trainer = tiny.make_trainer(UMITPretrainTrainer, plans)
        trainer.initialize()
        trainer.network.eval()
        trainer.batch_size = batch
        _, dataset = trainer.get_tr_and_val_datasets()
        outputs = trainer._score(dataset, dataset.identifiers[0])
        rows.append((len(outputs), trainer.summarise(outputs)["masked_loss"]))
    assert [passes for passes, _ in rows] == [4, 2, 4]
    assert [loss for _, loss in rows[1:]] == pytest.approx([rows[0][1]] * 2, rel=1e-5)


def test_names_that_no_log_can_hold_are_escaped(prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of a file that is no text has surrogates, which UTF-8 does not write."""
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "-pretrained_weights", "caf\udce9.pth"])
    trainer = tiny.make_trainer(UMITTrainer, prepare())
    assert "caf\\udce9.pth" in log_of(trainer)
    with monkeypatch.context() as patch:  # whatever the locale of this process
        patch.setattr(base.locale, "getpreferredencoding", lambda do_setlocale: "cp1252")
        patch.setattr(sys, "stdout", SimpleNamespace(encoding="utf-8"))
        escaped = base.printable("\u0141 \xe9")
    assert escaped == "\\u0141 \xe9"


def test_a_picture_that_cannot_be_written_ends_no_training(
    prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(shown: Any, path: Path, title: str) -> None:
        raise PermissionError(13, "in use", str(path))

    monkeypatch.setattr(base, "draw_progress", refuse)
    monkeypatch.setattr(selfsupervised, "draw_reconstructions", refuse)
    trainer = tiny.make_trainer(UMITPretrainTrainer, prepare())
    trainer.run_training()
    trainer.perform_actual_validation()
    assert trainer.current_epoch == 2 and (folder_of(trainer) / "encoder.safetensors").is_file()
    for name in ("progress", "reconstructions"):
        assert re.search(rf"a picture was not drawn \(\[Errno 13\] in use: .*{name}.png", log_of(trainer))


def test_checkpoint_holds_what_nnunet_reads_and_plain_values_only(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.run_training()
    stored = torch.load(folder_of(trainer) / checkpoints.FINAL, weights_only=True)
    stock = "network_weights optimizer_state grad_scaler_state logging _best_ema current_epoch init_args trainer_name"
    assert {*stock.split(), "inference_allowed_mirroring_axes", "umit"} == set(stored)
    assert stored["trainer_name"] == "UMITTrainer"
    assert stored["init_args"]["configuration"] == "3d_fullres" and stored["init_args"]["device"] == "cpu"
    assert stored["current_epoch"] == 2
    assert stored["inference_allowed_mirroring_axes"] == (0, 1, 2)
    assert set(stored["umit"]["versions"]) == {"nnunet_umit", "nnunetv2", "torch"}
    assert stored["umit"]["config"]["finetune"]["epochs"] == 2

    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, ("all",), checkpoints.FINAL)
    predicted = predictor.predict_sliding_window_return_logits(torch.randn(1, 18, 20, 22))
    assert predicted.shape == (3, 18, 20, 22)


@pytest.mark.parametrize(
    ("trainer_class", "options"),
    [
        (UMITPretrainTrainer, {"drop_path": 0.3}),
        (UMITTrainer, {"augmentation": "nnunet", "drop_path": 0.3}),
        (UMITTrainer, {"freeze": "encoder", "freeze_epochs": 2}),
    ],
)
def test_a_killed_training_continues_bit_for_bit(
    prepare: Callable[..., dict], nnunet_env: Any, monkeypatch: pytest.MonkeyPatch, trainer_class: type, options: dict
) -> None:
    section = {"epochs": 4, "picture_every": 10} if trainer_class is UMITPretrainTrainer else {"epochs": 4}
    plans = prepare(**{trainer_class.section: {**section, **options}})
    monkeypatch.setattr(trainer_class, "draw", lambda self: None)
    unbroken = tiny.make_trainer(trainer_class, plans)
    unbroken.run_training()
    assert len(set(unbroken.logged("train_losses"))) == 4

    monkeypatch.setenv("nnUNet_results", str(nnunet_env.results / "killed"))
    for position, kill in enumerate((1, 7)):  # in the first epoch, and again in the third
        broken = tiny.make_trainer(trainer_class, plans, resume=position > 0)
        if position:
            broken.load_checkpoint(str(folder_of(broken) / checkpoints.LATEST))
        kill_at(broken, kill)
        with pytest.raises(Killed):
            broken.run_training()
        torch.rand(3), np.random.rand(3)  # whatever else happens in between
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nor does the number of workers matter
    resumed = tiny.make_trainer(trainer_class, plans, resume=True)
    resumed.load_checkpoint(str(folder_of(resumed) / checkpoints.LATEST))
    assert resumed.current_epoch == 2
    resumed.run_training()
    assert curves(resumed) == curves(unbroken)
    assert equal(weights(resumed), weights(unbroken))
    assert resumed.history == unbroken.history


def test_labels_are_never_read(prepare: Callable[..., dict], nnunet_env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """MAE-9: the same curve with every segmentation and every property file deleted."""
    plans = prepare()
    monkeypatch.setattr(UMITPretrainTrainer, "draw", lambda self: None)
    with_labels = tiny.make_trainer(UMITPretrainTrainer, plans)
    with_labels.run_training()
    folder = nnunet_env.preprocessed / tiny.NAME / "UMITPlans_3d_fullres"
    for file in [*folder.glob("*_seg.b2nd"), *folder.glob("*.pkl")]:
        file.unlink()
    monkeypatch.setenv("nnUNet_results", str(nnunet_env.results / "blind"))
    blind = tiny.make_trainer(UMITPretrainTrainer, plans)
    blind.run_training()
    blind.perform_actual_validation()
    assert curves(blind) == curves(with_labels)
    assert equal(weights(blind), weights(with_labels))


def test_an_ignore_label_does_not_steer_pretraining(prepare: Callable[..., dict]) -> None:
    """nnU-Net's loader cuts patches at annotated voxels where there is an ignore label."""
    plans = prepare()
    labels = {"background": 0, "ball": 1, "box": 2, "ignore": 3}
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans, labels=labels)
    trainer.initialize()
    stream, _ = trainer.get_dataloaders()
    assert not stream.batches.samples.loader.has_ignore
    assert next(stream)["data"].shape == (2, 1, 16, 16, 16)


def test_validation_uses_the_same_batches_and_masks_every_epoch(prepare: Callable[..., dict]) -> None:
    plans = prepare(pretrain={"epochs": 3, "learning_rate": 1e-12, "weight_decay": 0})
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    trainer.run_training()
    losses = trainer.logged("val_losses")
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    assert len(set(trainer.logged("train_losses"))) == 3


def test_more_processes_than_samples_and_no_gpu_are_explained(
    prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = prepare(batch=2)
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.is_ddp = True
    monkeypatch.setattr(base.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="a batch of 2 cannot be shared out to 3 processes: set batch_size of 3d_full"):
        trainer._set_batch_size_and_oversample()
    plans["configurations"]["3d_fullres"]["batch_dice"] = True
    dice = tiny.make_trainer(UMITTrainer, plans)
    dice.is_ddp = True
    monkeypatch.setattr(base.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(base.distributed, "get_rank", lambda: 0)
    dice._set_batch_size_and_oversample()
    plans["configurations"]["3d_fullres"]["batch_size"] = 3
    dice = tiny.make_trainer(UMITTrainer, plans)
    dice.is_ddp = True
    with pytest.raises(ValueError, match="3 samples have no equal shares for 2 processes"):
        dice._set_batch_size_and_oversample()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch finds no GPU here: add -device cpu"):
        tiny.make_trainer(UMITTrainer, plans, device=torch.device("cuda"))


def test_every_step_hides_other_tokens(prepare: Callable[..., dict]) -> None:
    trainer = tiny.make_trainer(UMITPretrainTrainer, prepare())
    trainer.initialize()
    hidden: list[tuple[int, ...]] = []

    def watch(module: Any, _: Any, output: Any) -> None:
        if module.training:
            hidden.append(tuple(output.hidden.flatten().tolist()))

    trainer.unwrapped().register_forward_hook(watch)
    trainer.run_training()
    assert len(hidden) == len(set(hidden)) == 6


@pytest.mark.parametrize("trainer_class", [UMITPretrainTrainer, UMITTrainer])
def test_gradients_are_clipped(prepare: Callable[..., dict], trainer_class: type) -> None:
    trainer = tiny.make_trainer(trainer_class, prepare(**{trainer_class.section: {"clip_norm": 1e-3}}))
    trainer.run_training()
    gradients = [weight.grad for weight in trainer.network.parameters() if weight.grad is not None]
    assert torch.stack([each.norm() for each in gradients]).norm().item() == pytest.approx(1e-3, rel=0.01)


def test_pretraining_goes_on_from_an_encoder(pretrained: tuple[dict, Path]) -> None:
    """-pretrained_weights with UMITPretrainTrainer: every weight arrives, decoder included; the report is kept."""
    plans, source = pretrained
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    trainer.initialize()
    torch.nn.init.zeros_(trainer.network.embed.weight)
    report = trainer.network.load_umit_pretrained(str(source))
    assert report.fraction == 1.0 and not report.new and not report.adapted
    assert equal(weights(trainer), load_state(source)[0])
    kill_at(trainer, 0)
    with pytest.raises(Killed):
        trainer.run_training()
    assert read_checkpoint(folder_of(trainer) / checkpoints.LATEST)["umit"]["transfer"]["fraction"] == 1.0
    assert "100.0 % of the encoder" in log_of(trainer)


def test_progress_is_drawn_as_often_as_it_costs_a_twentieth(
    prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = tiny.make_trainer(UMITTrainer, prepare())
    clock, drawn = [0.0], []

    def draw(*_: object) -> None:
        clock[0] += 1.0
        drawn.append(trainer.current_epoch)

    monkeypatch.setattr(base, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(base, "draw_progress", draw)
    trainer.num_epochs = 50
    for trainer.current_epoch in range(50):
        clock[0] += 5.0
        trainer.draw()
    assert drawn == [*range(0, 49, 4), 49], "every 20 s, and after the last epoch"
