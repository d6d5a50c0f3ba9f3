"""The class-balanced cross-entropy that keeps every class alive until a network can tell them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_training as tiny
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_umit.config import FinetuneConfig
from nnunet_umit.trainers.balance import balanced_cross_entropy, fading
from nnunet_umit.trainers.finetune import UMITTrainer


def expected(logits: torch.Tensor, target: torch.Tensor, ignore: int | None) -> float:
    """The definition, in loops."""
    total = 0.0
    for sample, labels in zip(logits.log_softmax(1), target[:, 0], strict=True):
        present = [value for value in labels.unique().tolist() if value != ignore]
        means = [-sample[int(value)][labels == value].mean().item() for value in present]
        total += sum(means) / max(len(means), 1)
    return total / len(logits)


@pytest.mark.parametrize("ignore", [None, 3])
def test_every_class_of_a_sample_weighs_the_same(ignore: int | None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 3, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    target = torch.zeros(3, 1, 4, 6, 5)
    target[0, :, 1:3, 2:4], target[0, :, 0, 0, 0] = 1, 2  # 20 voxels, and a single one
    target[1, :, :, :, :2] = 2  # the second sample lacks class 1
    if ignore is not None:
        target[0, :, 3], target[2] = ignore, ignore  # the third has nothing that counts
    loss = balanced_cross_entropy(logits, target, ignore)
    assert loss.item() == pytest.approx(expected(logits.detach(), target, ignore), rel=1e-5)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    pull = logits.grad.abs().sum(1)
    assert pull[0, 0, 0, 0] > 5 * pull[0, 1, 2].max(), "a class of one voxel pulls as much as one of twenty"
    if ignore is not None:
        assert not pull[2].any() and not pull[0, 3].any()


def test_a_lost_class_is_pulled_back_by_balance_only() -> None:
    """40 of 4000 voxels of a class that the network gives a probability of 1e-4 everywhere."""
    target = torch.zeros(1, 1, 4000)
    target[..., :100], target[..., :40] = 1, 2
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    stock = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    pull = {}
    for name, loss in (("stock", stock), ("balanced", balanced_cross_entropy)):
        probabilities = torch.tensor([0.4999, 0.5, 1e-4]).view(1, 3, 1).expand(1, 3, 4000)
        logits = probabilities.log().clone().requires_grad_()
        loss(logits, target).backward()
        pull[name] = -logits.grad[0, 2, :40].sum().item()
    assert pull["stock"] == pytest.approx(40 / 4000, rel=0.1), "Dice adds nothing to its share of the voxels"
    assert pull["balanced"] == pytest.approx(1 / 3, rel=1e-3)


def test_it_fades_linearly_and_is_gone() -> None:
    assert [fading(progress, 0.5) for progress in (0.0, 0.25, 0.5, 0.9)] == [1.0, 0.5, 0.0, 0.0]
    assert fading(0.0, 0.0) == 0.0
    with pytest.raises(ValueError, match=r"balance is 1\.5 but must be from 0 to 1"):
        FinetuneConfig(balance=1.5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("regions", [False, True])
def test_the_trainer_adds_it_until_it_has_faded(prepare: Callable[..., dict], regions: bool) -> None:
    labels = {"labels": {"background": 0, "whole": [1, 2], "box": 2}, "regions_class_order": [1, 2]} if regions else {}
    trainer = tiny.make_trainer(UMITTrainer, prepare(finetune={"balance": 0.5, "epochs": 4}), **labels)
    trainer.initialize()
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    trainer.network.eval()  # no drop path: the same output each time
    batch = next(trainer.dataloader_train)
    output = trainer.network(batch["data"])
    stock = trainer.loss(output, batch["target"]).item()
    extra = []
    for epoch in range(4):
        trainer.current_epoch = epoch
        extra.append(trainer.compute_loss(batch).item() - stock)
    if regions:
        assert extra == pytest.approx([0.0] * 4, abs=1e-6)
        return
    factors = trainer.loss.weight_factors
    whole = sum(
        factor * balanced_cross_entropy(logits, target).item()
        for factor, logits, target in zip(factors, output, batch["target"], strict=True)
    )
    assert whole > 0.5
    assert extra == pytest.approx([whole, whole / 2, 0.0, 0.0], abs=1e-4)
