"""What only fine-tuning has: labels of every kind, mirroring, freezing, layer-wise rates."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training as tiny
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform, blur_dimension
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_training import GEOMETRIES, Killed, case_file, folder_of, kill_at, log_of, weights
from torch import nn

from nnunet_umit.trainers import checkpoint as checkpoints
from nnunet_umit.trainers import finetune, resume
from nnunet_umit.trainers.finetune import LIGHT_BELOW, UMITTrainer, confusion
from nnunet_umit.trainers.pretrain import UMITPretrainTrainer
from nnunet_umit.trainers.summary import summarise

pytestmark = pytest.mark.usefixtures("one_thread")


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
        ({"augmentation": "none", "mirror_axes": [0, 1]}, None),
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


def test_pre_training_mirrors_what_the_plan_lets_be_mirrored(prepare: Callable[..., dict]) -> None:
    trainer = tiny.make_trainer(UMITPretrainTrainer, prepare(pretrain={"mirror_axes": [1]}))
    *_, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    transforms = trainer.training_transforms((16, 16, 16), None, axes, False, None).transforms
    image = torch.arange(64.0).view(1, 4, 4, 4)
    torch.manual_seed(0)
    seen = {tuple(transforms[-1](image=image)["image"].flatten().tolist()) for _ in range(30)}
    assert seen == {tuple(image.flatten().tolist()), tuple(image.flip(2).flatten().tolist())}


@pytest.mark.parametrize(("missing", "chosen"), [(0, "nnunet"), (1, "light")])
def test_augmentation_is_light_where_a_case_is_shown_a_few_times(
    prepare: Callable[..., dict], missing: int, chosen: str
) -> None:
    trainer = tiny.make_trainer(UMITTrainer, prepare(finetune={"augmentation": "auto"}))
    cases, batch = len(trainer.do_split()[0]), trainer.configuration_manager.batch_size
    trainer.num_iterations_per_epoch = cases
    trainer.num_epochs = LIGHT_BELOW // batch - missing
    assert LIGHT_BELOW % batch == 0 and trainer.augmentation == chosen
    rotation, *_ = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert (rotation is None) == (chosen == "light")


def test_mirroring_an_axis_that_is_not_there_is_refused(prepare: Callable[..., dict]) -> None:
    plans = prepare(**GEOMETRIES["2D"], finetune={"mirror_axes": [2]})
    trainer = tiny.make_trainer(UMITTrainer, plans)
    with pytest.raises(ValueError, match=r"mirror_axes is \[2\] but the patch has axes 0 to 1"):
        trainer.mirrored_axes()


def test_without_augmentation_batches_are_crops(prepare: Callable[..., dict]) -> None:
    trainer = tiny.make_trainer(UMITTrainer, prepare(finetune={"augmentation": "none"}))
    trainer.initialize()
    stream, _ = trainer.get_dataloaders()
    batch = next(stream)
    values = np.unique(np.concatenate([trainer_case(trainer, key).ravel() for key in set(batch["keys"])]))
    assert np.isin(batch["data"].numpy(), np.append(values, 0.0)).all()


def trainer_case(trainer: Any, key: str) -> np.ndarray:
    return trainer.dataset_class(trainer.preprocessed_dataset_folder).load_case(key)[0][:]


def test_nnunets_blur_has_no_stop_watch_and_leaves_short_axes_alone(prepare: Callable[..., dict]) -> None:
    """It times two algorithms that differ in the last bits, and fails where a crop has a slice or two."""
    trainer = tiny.make_trainer(UMITTrainer, prepare(finetune={"augmentation": "nnunet"}))
    trainer.initialize()
    transforms = trainer.training_transforms((16, 16, 16), (-0.5, 0.5), (0, 1, 2), False, None).transforms
    blurs = [
        each.transform for each in transforms if isinstance(getattr(each, "transform", None), GaussianBlurTransform)
    ]
    (blur,) = blurs
    blur.p_per_channel, blur.blur_sigma = 1.0, 1.0
    for depth in (1, 2, 3, 4, 5):
        image = torch.randn(1, depth, 16, 16)
        expected = blur_dimension(image, 1.0, 0) if depth > 4 else image
        expected = blur_dimension(blur_dimension(expected, 1.0, 1), 1.0, 2)
        assert torch.equal(blur(image=image.clone())["image"], expected)
    assert not blur.benchmark_use_fft


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


def test_what_a_continued_training_releases_is_averaged_over_ranks(
    prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP averages the gradients of what was trainable when it wrapped the network."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.averaged = module, [parameter.requires_grad for parameter in module.parameters()]

    for room in (finetune, resume):
        monkeypatch.setattr(room, "DistributedDataParallel", Wrapper)
    monkeypatch.setattr(finetune, "wrap", lambda network, device: Wrapper(network))
    plans = prepare(finetune={"freeze": "encoder", "freeze_epochs": 1})
    tiny.make_trainer(UMITTrainer, plans).run_training()
    again = tiny.make_trainer(UMITTrainer, plans, resume=True)
    again.initialize()
    again.network = Wrapper(again.network)
    assert not all(again.network.averaged)
    again.load_checkpoint(str(folder_of(again) / "checkpoint_final.pth"))
    assert all(again.network.averaged) and not isinstance(again.network.module, Wrapper)


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
    tiny.spoil(case_file(nnunet_env.preprocessed, 0), value=0.0)
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    trainer.run_training()
    trainer.perform_actual_validation()
    assert trainer.guard.total == 0
