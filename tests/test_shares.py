"""The loss for drawn labels: probabilities become the shares of the classes, at the strength of Dice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_training as tiny
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_umit.trainers.finetune import UMITTrainer
from nnunet_umit.trainers.shares import share_loss

DICE = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}


def pull(loss: Callable[..., torch.Tensor], share: float, probability: float) -> float:
    """Derivative by the logit of class 1 in 1000 voxels of one probability, ``share`` of which drew that class; 500
    more surely have it, and 8500 surely not."""
    target = torch.zeros(1, 1, 10000)
    target[..., : round(1000 * share)] = 1
    target[..., 1000:1500] = 1
    logit = torch.tensor(probability).logit().requires_grad_()
    sure = torch.where(target[0, 0, 1000:] == 1, 8.0, -8.0)
    foreground = torch.cat((logit.expand(1000), sure))
    loss(torch.stack((torch.zeros_like(foreground), foreground)).unsqueeze(0), target).backward()
    assert logit.grad is not None
    return float(logit.grad)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_it_is_least_at_the_share_and_nnunets_is_not(share: float) -> None:
    assert pull(share_loss, share, share) == pytest.approx(0.0, abs=1e-6)
    assert pull(share_loss, share, share - 0.1) < -0.02 and pull(share_loss, share, share + 0.1) > 0.02
    stock = DC_and_CE_loss(DICE, {}, dice_class=MemoryEfficientSoftDiceLoss)
    decides = pull(stock, share, share)
    assert decides > 0.02 if share < 0.4 else decides < -0.02


@pytest.mark.parametrize("ignore", [None, 3])
def test_its_value_is_cross_entropy_and_vnets_dice(ignore: int | None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 6, 5, requires_grad=True)
    target = torch.randint(0, 3, (2, 1, 4, 6, 5))
    if ignore is not None:
        target[0, :, 3] = ignore
    counted = torch.ones(240, dtype=torch.bool) if ignore is None else (target[:, 0] != ignore).flatten()
    probabilities = logits.detach().softmax(1).movedim(1, -1).reshape(-1, 3)[counted]
    labels = target[:, 0].flatten()[counted]
    entropy = -probabilities[torch.arange(len(labels)), labels].log().mean()
    dice = [
        1 - 2 * (p * y).sum() / (p.square().sum() + y.sum())
        for p, y in ((probabilities[:, each], (labels == each).float()) for each in (1, 2))
    ]
    loss = share_loss(logits, target, ignore)
    assert loss.item() == pytest.approx(float(entropy + sum(dice) / 2), rel=1e-5)
    loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    if ignore is not None:
        assert not logits.grad[0, :, 3].any()


def test_nothing_to_learn_from_gives_zero() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = share_loss(logits, torch.full((1, 1, 4, 4), 2), 2)
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("thicken", "drawn"), [(0.0, False), (1.0, True)])
def test_the_trainer_takes_it_where_slices_were_averaged(nnunet_env: Any, thicken: float, drawn: bool) -> None:
    plans = tiny.make_plans(native=True, finetune={"thicken": thicken, "balance": 0.0})
    tiny.write_preprocessed(nnunet_env.preprocessed, plans, spacings=((1.0, 1.0, 1.0),))
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.initialize()
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    trainer.network.eval()  # no drop path: the same output each time
    batch = next(trainer.dataloader_train)
    assert batch["drawn"] is drawn
    outputs = trainer.network(batch["data"])
    factors = trainer.loss.weight_factors
    shares = sum(f * share_loss(each, batch["target"]).item() for f, each in zip(factors, outputs, strict=True))
    stock = trainer.loss(outputs, [batch["target"]] * len(outputs)).item()
    assert abs(shares - stock) > 0.1
    assert trainer.compute_loss(batch).item() == pytest.approx(shares if drawn else stock, rel=1e-5)
