"""Both trainers in this process, on a dataset of a few thousand voxels and a network of a few thousand weights."""

import copy
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training as tiny
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_umit.architectures.transfer import load_state
from nnunet_umit.trainers import checkpoint as checkpoints
from nnunet_umit.trainers.base import use_own_cores
from nnunet_umit.trainers.checkpoint import CheckpointError, read_checkpoint
from nnunet_umit.trainers.finetune import UMITTrainer, confusion, mirrored_axes
from nnunet_umit.trainers.guard import NonFiniteGuard, NonFiniteLossError
from nnunet_umit.trainers.pretrain import UMITPretrainTrainer
from nnunet_umit.trainers.summary import summarise

logging.getLogger("matplotlib").setLevel(logging.WARNING)
TRAINERS = (UMITPretrainTrainer, UMITTrainer)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks are slower on many threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def prepare(nnunet_env: Any) -> Callable[..., dict[str, Any]]:
    """Write a preprocessed dataset for ``make_plans(**options)`` and return the plans."""

    def prepare(cases: int = 4, ignore: int | None = None, **options: Any) -> dict[str, Any]:
        plans = tiny.make_plans(**options)
        tiny.write_preprocessed(nnunet_env.preprocessed, plans, cases=cases, ignore=ignore)
        return plans

    return prepare


def folder_of(trainer: Any) -> Path:
    return Path(trainer.output_folder)


def curves(trainer: Any) -> dict[str, list[float]]:
    return {name: trainer.logged(name) for name in ("train_losses", "val_losses", "lrs", "ema_fg_dice")}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.unwrapped().state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log_of(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the trainer catches it."""


def kill_at(trainer: Any, iteration: int) -> None:
    """Let the training die in the middle of a step."""
    step = trainer.train_step

    def dying(batch: dict) -> dict:
        if trainer.iteration() == iteration:
            raise Killed
        return step(batch)

    trainer.train_step = dying


GEOMETRIES = {
    "isotropic": {},
    "thick slices, two channels": {
        "spacing": (4.0, 1.0, 1.0), "patch": (6, 16, 16), "channels": 2,
    },
    "2D": {"spacing": (1.0, 1.0), "patch": (16, 24)},
}  # fmt: skip


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
    assert not stream.batches.loader.has_ignore
    assert next(stream)["data"].shape == (2, 1, 16, 16, 16)


def test_validation_uses_the_same_batches_and_masks_every_epoch(prepare: Callable[..., dict]) -> None:
    plans = prepare(pretrain={"epochs": 3, "learning_rate": 1e-12, "weight_decay": 0})
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    trainer.run_training()
    losses = trainer.logged("val_losses")
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    assert len(set(trainer.logged("train_losses"))) == 3


# ------------------------------------------------------------------------------------------------- interruptions


@pytest.fixture
def pretrained(prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> tuple[dict, Path]:
    """Plans, and a checkpoint of a pre-training that has just begun."""
    plans = prepare()
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    kill_at(trainer, 0)
    with pytest.raises(Killed):
        trainer.run_training()
    return plans, folder_of(trainer) / checkpoints.LATEST


def test_a_kill_before_the_first_epoch_keeps_the_pretrained_weights(pretrained: tuple[dict, Path]) -> None:
    plans, source = pretrained
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.initialize()
    trainer.network.load_umit_pretrained(str(source))
    before = weights(trainer)
    kill_at(trainer, 0)
    with pytest.raises(Killed):
        trainer.run_training()
    resumed = tiny.make_trainer(UMITTrainer, plans, resume=True)
    resumed.load_checkpoint(str(folder_of(resumed) / checkpoints.LATEST))
    assert resumed.current_epoch == 0
    assert equal(weights(resumed), before)
    encoder, _ = load_state(source)
    name = "encoder.transformer.blocks.0.attn.qkv.weight"
    assert torch.equal(resumed.network.state_dict()[name], encoder[name])
    resumed.save_checkpoint(str(folder_of(resumed) / "again.pth"))
    assert read_checkpoint(folder_of(resumed) / "again.pth")["umit"]["transfer"]["fraction"] == 1.0


def test_continuing_a_training_that_left_no_checkpoint_is_refused(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    fresh = tiny.make_trainer(UMITTrainer, plans, resume=True)  # an empty folder: --c starts, as in nnU-Net
    fresh.initialize()
    fresh.begin_folder()
    (folder_of(fresh) / checkpoints.LATEST).unlink()
    (folder_of(fresh) / "training_log_2020_1_1_00_00_00.txt").write_text("an earlier start")
    lost = tiny.make_trainer(UMITTrainer, plans, resume=True)
    with pytest.raises(CheckpointError, match=r"-pretrained_weights.*without --c"):
        lost.run_training()


def test_a_former_training_is_moved_aside(prepare: Callable[..., dict]) -> None:
    """Else --c after a kill would find the old checkpoint_final.pth and call the new training finished."""
    plans = prepare()
    trainer = tiny.make_trainer(UMITTrainer, plans)
    for name in (checkpoints.FINAL, checkpoints.BEST, checkpoints.PREVIOUS):
        (folder_of(trainer) / name).write_bytes(b"old")
    kill_at(trainer, 0)
    with pytest.raises(Killed):
        trainer.run_training()
    names = {file.name for file in folder_of(trainer).glob("*.pth")}
    assert names == {"old_checkpoint_final.pth", "old_checkpoint_best.pth", checkpoints.LATEST}


def test_disabled_checkpointing_writes_none(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    trainer.disable_checkpointing = True
    trainer.run_training()
    trainer.perform_actual_validation()
    assert not [*folder_of(trainer).glob("*.pth"), *folder_of(trainer).glob("*.safetensors")]
    assert (folder_of(trainer) / "validation" / "summary.json").is_file()


def test_the_latest_checkpoint_knows_the_best_score(
    prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nnU-Net writes latest before it updates the best score, so a resumed training may overwrite a better best."""
    plans = prepare(finetune={"epochs": 2})
    trainer = tiny.make_trainer(UMITTrainer, plans)
    seen = []
    save = trainer.save_checkpoint

    def watch(filename: str) -> None:
        save(filename)
        stored = read_checkpoint(filename)
        seen.append((Path(filename).name, stored["_best_ema"], stored["logging"]["ema_fg_dice"]))

    trainer.save_checkpoint = watch
    trainer.run_training()
    latest = [entry for entry in seen if entry[0] == checkpoints.LATEST]
    assert latest[0][1:] == (None, []) and latest[1][1] == latest[1][2][0]


def test_a_checkpoint_of_another_trainer_or_network_is_refused(pretrained: tuple[dict, Path]) -> None:
    plans, source = pretrained
    trainer = tiny.make_trainer(UMITTrainer, plans)
    with pytest.raises(CheckpointError, match=r"UMITPretrainTrainer.*UMITTrainer.*-pretrained_weights"):
        trainer.load_checkpoint(str(source))
    wider = copy.deepcopy(plans)
    wider["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["embed_dim"] = 48
    with pytest.raises(CheckpointError, match="embed_dim: 24 in the checkpoint, 48 now"):
        tiny.make_trainer(UMITPretrainTrainer, wider).load_checkpoint(str(source))
    deeper = copy.deepcopy(plans)
    deeper["configurations"]["3d_fullres"]["umit"]["pretrain"]["decoder_depth"] = 2
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: decoder\.blocks\.1"):
        tiny.make_trainer(UMITPretrainTrainer, deeper).load_checkpoint(str(source))


def test_the_plan_counts_when_it_changed(pretrained: tuple[dict, Path]) -> None:
    plans, source = pretrained
    plans = copy.deepcopy(plans)
    plans["configurations"]["3d_fullres"]["umit"]["pretrain"].update(epochs=9, learning_rate=0.5, weight_decay=0.25)
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans, resume=True)
    trainer.load_checkpoint(str(source))
    assert trainer.num_epochs == 9
    assert {group["base_lr"] for group in trainer.optimizer.param_groups} == {0.5}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.25}
    assert "the plan counts: epochs: 2 in the checkpoint, 9 now" in log_of(trainer)


# ----------------------------------------------------------------------------------------------------- bad input


def case_file(nnunet_env: Any, index: int) -> Path:
    return nnunet_env.preprocessed / tiny.NAME / "UMITPlans_3d_fullres" / f"case_{index:03d}.b2nd"


def test_a_broken_image_is_named_and_its_steps_are_skipped(prepare: Callable[..., dict], nnunet_env: Any) -> None:
    plans = prepare(finetune={"iterations_per_epoch": 8}, batch=2)
    tiny.spoil(case_file(nnunet_env, 1))
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.run_training()
    assert 0 < trainer.guard.total < 16
    assert "the loss is not finite; step skipped (1 in a row, 1 in all). Cases in this batch:" in log_of(trainer)
    skipped = [line for line in log_of(trainer).splitlines() if "step skipped" in line]
    assert len(skipped) == trainer.guard.total and all("case_001" in line for line in skipped)
    assert all(math.isfinite(loss) for loss in trainer.logged("train_losses"))
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert read_checkpoint(folder_of(trainer) / checkpoints.FINAL)["umit"]["guard"]["total"] == trainer.guard.total


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_too_many_broken_steps_stop_the_training(
    prepare: Callable[..., dict], nnunet_env: Any, trainer_class: type
) -> None:
    plans = prepare(**{trainer_class.section: {"max_nonfinite": 2}})
    for index in range(4):
        tiny.spoil(case_file(nnunet_env, index))
    trainer = tiny.make_trainer(trainer_class, plans)
    with pytest.raises(NonFiniteLossError, match=r"2 steps in a row \(limit: max_nonfinite = 2.*checkpoint_latest"):
        trainer.run_training()
    stored = read_checkpoint(folder_of(trainer) / checkpoints.LATEST)
    assert all(value.isfinite().all() for value in stored["network_weights"].values())


def test_an_infinite_gradient_skips_the_step_and_counts(prepare: Callable[..., dict]) -> None:
    plans = prepare(finetune={"max_nonfinite": 3})
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.initialize()
    before = weights(trainer)
    trainer.network.decoder.seg_layers["head0"].weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLossError, match="the gradient was not finite in 3 steps in a row"):
        trainer.run_training()
    assert equal(before, weights(trainer))


def test_the_guard_forgets_after_a_good_step() -> None:
    lines: list[str] = []
    guard = NonFiniteGuard(2, lines.append)
    assert not guard.accept(False, ["a", "b", "a"], step=7)
    assert guard.accept(True, ["c"], step=8)
    assert not guard.accept(False, ["d"], step=9)
    assert lines[0].endswith("Cases in this batch: a, b") and guard.total == 2
    restored = NonFiniteGuard(2, lines.append)
    restored.load_state_dict(guard.state_dict())
    with pytest.raises(NonFiniteLossError):
        restored.accept(False, ["e"], step=10)


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_plans_of_another_planner_are_refused(prepare: Callable[..., dict], trainer_class: type) -> None:
    plans = prepare()
    del plans["configurations"]["3d_fullres"]["umit"]
    with pytest.raises(ValueError, match="-pl UMITPlanner"):
        tiny.make_trainer(trainer_class, plans)


def test_unknown_configuration_cascade_and_unknown_key_are_refused(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    with pytest.raises(ValueError, match="no configuration '3d_lowres'; they have 3d_fullres"):
        UMITTrainer(copy.deepcopy(plans), "3d_lowres", 0, tiny.dataset_json(), torch.device("cpu"))
    small = copy.deepcopy(plans)
    small["configurations"]["3d_fullres"]["patch_size"][1] = 3
    with pytest.raises(ValueError, match="smaller than one token .* along axis 1"):
        tiny.make_trainer(UMITTrainer, small)
    cascade = copy.deepcopy(plans)
    cascade["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    with pytest.raises(NotImplementedError, match="cascade"):
        tiny.make_trainer(UMITTrainer, cascade)
    wrong = copy.deepcopy(plans)
    wrong["configurations"]["3d_fullres"]["umit"]["finetune"]["epoch"] = 3
    with pytest.raises(ValueError, match=r"did you mean umit\.finetune\.epochs"):
        tiny.make_trainer(UMITTrainer, wrong)


def test_missing_folders_and_cases_name_the_remedy(
    prepare: Callable[..., dict], nnunet_env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = prepare()
    trainer = tiny.make_trainer(UMITTrainer, plans)
    (nnunet_env.preprocessed / tiny.NAME / "UMITPlans_3d_fullres").rename(nnunet_env.preprocessed / "elsewhere")
    command = f"nnUNetv2_preprocess -d {tiny.NAME} -plans_name UMITPlans -c 3d_fullres"
    with pytest.raises(FileNotFoundError, match=command):
        trainer.run_training()
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(RuntimeError, match="nnUNet_results is not set"):
        tiny.make_trainer(UMITTrainer, plans)


def test_threads_are_limited_to_own_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    torch.set_num_threads(2)
    use_own_cores()
    assert torch.get_num_threads() == 1


def test_too_few_cases_for_folds_are_explained(prepare: Callable[..., dict]) -> None:
    plans = prepare(cases=3)
    trainer = tiny.make_trainer(UMITTrainer, plans, fold=0)
    with pytest.raises(ValueError, match="3 cases cannot be split into 5 folds; train fold 'all'"):
        trainer.run_training()


def test_pretraining_cannot_oversample_foreground(prepare: Callable[..., dict]) -> None:
    plans = prepare(pretrain={"oversample_foreground": 0.5})
    with pytest.raises(ValueError, match="reads no label"):
        tiny.make_trainer(UMITPretrainTrainer, plans)


def test_workers_end_with_the_training(prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    plans = prepare()
    trainer = tiny.make_trainer(UMITTrainer, plans)
    kill_at(trainer, 2)
    with pytest.raises(Killed):
        trainer.run_training()
    for child in multiprocessing.active_children():
        child.join(10)
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------------------------ fine-tuning


REGIONS = {"background": 0, "whole": [1, 2], "box": 2}
IGNORE = {"background": 0, "ball": 1, "box": 2, "ignore": 3}
REGIONS_AND_IGNORE = {**REGIONS, "ignore": 3}
LABELS = {
    "classes": {},
    "ignore": {"labels": IGNORE},
    "regions": {"labels": REGIONS, "regions_class_order": [1, 2]},
    "regions and ignore": {"labels": REGIONS_AND_IGNORE, "regions_class_order": [1, 2]},
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("augmentation", ["light", "nnunet"])
def test_labels_regions_and_ignore(prepare: Callable[..., dict], kind: str, augmentation: str) -> None:
    """One training step, and validation counts that equal those of nnU-Net's own validation step."""
    description = LABELS[kind]
    ignore = description.get("labels", {}).get("ignore")
    plans = prepare(finetune={"augmentation": augmentation}, ignore=ignore)
    trainer = tiny.make_trainer(UMITTrainer, plans, **description)
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.on_train_epoch_start()
    assert math.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])
    batch = next(trainer.dataloader_val)
    trainer.network.eval()
    with torch.no_grad():
        ours = trainer.validation_step(copy.deepcopy(batch))
        stock = nnUNetTrainer.validation_step(trainer, copy.deepcopy(batch))
    for name in ("tp_hard", "fp_hard", "fn_hard"):
        assert ours[name] == pytest.approx(stock[name])
    assert ours["loss"] == pytest.approx(float(stock["loss"]))
    assert len(ours["tp_hard"]) == 2
    assert sum(ours[name].sum() for name in ours if name != "loss") > 0


def test_confusion_by_hand() -> None:
    class Plain:
        has_regions = has_ignore_label = False

    logits = torch.zeros(1, 3, 1, 4)
    for position, label in enumerate((0, 1, 1, 2)):
        logits[0, label, 0, position] = 1
    counts = confusion(logits, torch.tensor([[[[0, 1, 2, 2]]]]), Plain())
    assert [counts[name].tolist() for name in ("tp_hard", "fp_hard", "fn_hard")] == [[1, 1], [1, 0], [0, 1]]


def test_pseudo_dice_survives_absent_classes(prepare: Callable[..., dict]) -> None:
    trainer = tiny.make_trainer(UMITTrainer, prepare())
    trainer.initialize()
    nothing = {"loss": 1.0, **{name: np.zeros(2) for name in ("tp_hard", "fp_hard", "fn_hard")}}
    something = {"loss": 1.0, "tp_hard": np.array([1, 0]), "fp_hard": np.array([1, 0]), "fn_hard": np.array([1, 0])}
    for epoch, outputs in enumerate(([nothing], [something], [nothing])):
        trainer.current_epoch = epoch
        trainer.on_validation_epoch_end(outputs)
    assert trainer.logged("mean_fg_dice") == pytest.approx([0.0, 0.5, 0.05])
    assert all(math.isfinite(value) for value in trainer.logged("ema_fg_dice"))
    assert trainer.logger.get_value("dice_per_class_or_region", step=1) == pytest.approx([0.5, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("options", "axes"),
    [
        ({"augmentation": "nnunet"}, (0, 1, 2)),
        ({"augmentation": "light", "mirror_axes": [1, 2]}, (1, 2)),
        ({"augmentation": "light", "mirror_axes": []}, None),
        ({"augmentation": "none"}, None),
    ],
)
def test_mirrored_axes_follow_the_plan_into_prediction(prepare: Callable[..., dict], options: dict, axes: Any) -> None:
    trainer = tiny.make_trainer(UMITTrainer, prepare(finetune=options))
    rotation, _, larger, mirrored = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert mirrored == axes == trainer.inference_allowed_mirroring_axes
    assert (rotation is None) == (options["augmentation"] != "nnunet")
    if options["augmentation"] != "nnunet":
        assert list(larger) == [16, 16, 16]
    else:
        assert all(size > 16 for size in larger)


def test_mirroring_an_axis_that_is_not_there_is_refused(prepare: Callable[..., dict]) -> None:
    plans = prepare(**GEOMETRIES["2D"], finetune={"mirror_axes": [2]})
    trainer = tiny.make_trainer(UMITTrainer, plans)
    with pytest.raises(ValueError, match=r"mirror_axes is \[2\] but the patch has axes 0 to 1"):
        mirrored_axes(trainer.config, 2)


def test_without_augmentation_batches_are_crops(prepare: Callable[..., dict]) -> None:
    trainer = tiny.make_trainer(UMITTrainer, prepare(finetune={"augmentation": "none"}))
    trainer.initialize()
    stream, _ = trainer.get_dataloaders()
    batch = next(stream)
    values = np.unique(np.concatenate([trainer_case(trainer, key).ravel() for key in set(batch["keys"])]))
    assert np.isin(batch["data"].numpy(), np.append(values, 0.0)).all()


def trainer_case(trainer: Any, key: str) -> np.ndarray:
    return trainer.dataset_class(trainer.preprocessed_dataset_folder).load_case(key)[0][:]


def test_nnunet_augmentation_has_no_stop_watch(prepare: Callable[..., dict]) -> None:
    """nnU-Net's blur times two algorithms that differ in the last bits, and keeps the quicker one."""
    trainer = tiny.make_trainer(UMITTrainer, prepare(finetune={"augmentation": "nnunet"}))
    trainer.initialize()
    transforms = trainer.training_transforms((-0.5, 0.5), (0, 1, 2), False, None).transforms
    blurs = [
        each.transform for each in transforms if isinstance(getattr(each, "transform", None), GaussianBlurTransform)
    ]
    assert len(blurs) == 1 and not blurs[0].benchmark


def test_frozen_encoder_rests_and_is_released(prepare: Callable[..., dict]) -> None:
    trainer = tiny.make_trainer(UMITTrainer, prepare(finetune={"freeze": "encoder", "freeze_epochs": 1}))
    states = []
    save = trainer.save_checkpoint

    def watch(filename: str) -> None:
        states.append(weights(trainer))
        save(filename)

    trainer.save_checkpoint = watch
    trainer.run_training()
    start, first, last = states[0], states[1], states[-1]
    for name in start:
        if name.startswith("encoder."):
            assert torch.equal(start[name], first[name])
    assert not torch.equal(start["decoder.seg_layers.head0.weight"], first["decoder.seg_layers.head0.weight"])
    assert not torch.equal(first["encoder.stem.full.conv.weight"], last["encoder.stem.full.conv.weight"])
    assert "tensors are trained from now on" in log_of(trainer)


def test_drop_path_comes_from_the_finetune_section(prepare: Callable[..., dict]) -> None:
    trainer = tiny.make_trainer(UMITTrainer, prepare(finetune={"drop_path": 0.4}, pretrain={"drop_path": 0.2}))
    trainer.initialize()
    assert [block.drop_path for block in trainer.network.encoder.transformer.blocks] == [0.0, 0.4]
    pretrainer = tiny.make_trainer(UMITPretrainTrainer, prepare_again(trainer))
    pretrainer.initialize()
    assert [block.drop_path for block in pretrainer.network.encoder.transformer.blocks] == [0.0, 0.2]


def prepare_again(trainer: Any) -> dict[str, Any]:
    return trainer.plans_manager.plans


def test_layer_rates_reach_the_optimizer(pretrained: tuple[dict, Path]) -> None:
    """SH-7 in the trainer: with pre-trained weights, rates still differ by layer at the end of a training.

    From scratch there is nothing to protect, and all layers learn at one rate.
    """
    plans, source = copy.deepcopy(pretrained[0]), pretrained[1]
    plans["configurations"]["3d_fullres"]["umit"]["finetune"]["layer_decay"] = 0.5
    for pretrained_weights, expected in ((True, [0.125, 0.25, 0.5, 1.0]), (False, [1.0] * 4)):
        trainer = tiny.make_trainer(UMITTrainer, plans)
        trainer.initialize()
        if pretrained_weights:
            trainer.network.load_umit_pretrained(str(source))
        kill_at(trainer, 4)
        with pytest.raises(Killed):
            trainer.run_training()
        resumed = tiny.make_trainer(UMITTrainer, plans, resume=True)
        resumed.load_checkpoint(str(folder_of(resumed) / checkpoints.LATEST))
        resumed.run_training()
        rates = {group["layer"]: group["lr"] for group in resumed.optimizer.param_groups}
        assert [rates[layer] / rates[3] for layer in range(4)] == pytest.approx(expected)


def test_variance_explained_allows_for_constant_patches() -> None:
    assert summarise([{"loss": 0.5, "power": 1.0}]) == (0.5, 0.5)
    assert summarise([{"loss": 0.25, "power": 0.5}, {"loss": math.nan, "power": 1.0}]) == (0.25, 0.5)
    assert summarise([{"loss": 0.0, "power": 0.0}]) == (0.0, 0.0)
    loss, explained = summarise([{"loss": math.nan, "power": 1.0}])
    assert math.isnan(loss) and math.isnan(explained)


def test_a_constant_image_trains(prepare: Callable[..., dict], nnunet_env: Any) -> None:
    plans = prepare(cases=1)
    tiny.spoil(case_file(nnunet_env, 0), value=0.0)
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    trainer.run_training()
    trainer.perform_actual_validation()
    assert trainer.guard.total == 0
