"""Tokenizer and soft-token pre-training in this process, down to a fine-tuning, and through kills."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from tiny_training import GEOMETRIES, Killed, curves, equal, folder_of, kill_at, log_of, weights

from nnunet_umit.architectures.tokenizer_training import TokenizerTraining
from nnunet_umit.trainers.checkpoint import read_checkpoint
from nnunet_umit.trainers.finetune import UMITTrainer
from nnunet_umit.trainers.guard import NonFiniteLossError
from nnunet_umit.trainers.soft_tokens import UMITSoftTokenPretrainTrainer
from nnunet_umit.trainers.tokenizer import UMITTokenizerTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
logging.getLogger("matplotlib").setLevel(logging.WARNING)


def finished_tokenizer(plans: dict[str, Any]) -> Path:
    trainer = tiny.make_trainer(UMITTokenizerTrainer, plans)
    trainer.run_training()
    trainer.perform_actual_validation()
    return folder_of(trainer)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_tokenize_pretrain_finetune(prepare: Callable[..., dict], geometry: str) -> None:
    plans = prepare(**GEOMETRIES[geometry])
    folder = finished_tokenizer(plans)
    names = {file.name for file in folder.iterdir()}
    assert names >= {"checkpoint_final.pth", "progress.png", "reconstructions.png", "codebook.png"}
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert summary["codes"] == 8 and 1 <= summary["pooled"]["perplexity"] <= 8.01
    assert 0 < summary["pooled"]["codes_used"] <= 8 and 0 <= summary["pooled"]["entropy"] <= 2.08
    assert summary["mean"]["psnr"] > 5

    pretrainer = tiny.make_trainer(UMITSoftTokenPretrainTrainer, plans)
    pretrainer.initialize()
    pretrainer.network.load_umit_pretrained(str(folder / "checkpoint_final.pth"))
    pretrainer.run_training()
    pretrainer.perform_actual_validation()
    folder = folder_of(pretrainer)
    names = {file.name for file in folder.iterdir()}
    assert names >= {"checkpoint_final.pth", "encoder.safetensors", "card.json", "progress.png", "reconstructions.png"}
    card = json.loads((folder / "card.json").read_text())
    assert card["method"].startswith("masked soft-token modelling") and card["metrics"]["cross_entropy"] > 0

    for source in ("checkpoint_final.pth", "encoder.safetensors"):
        trainer = tiny.make_trainer(UMITTrainer, plans)
        trainer.initialize()
        assert trainer.network.load_umit_pretrained(str(folder / source)).fraction == 1.0


@pytest.mark.parametrize("options", [{}, {"quantiser": "gumbel", "discriminator": 0.01}])
def test_a_killed_tokenizer_continues_exactly(prepare: Callable[..., dict], options: dict[str, Any]) -> None:
    plans = prepare(tokenizer={"epochs": 3, **options})
    whole = tiny.make_trainer(UMITTokenizerTrainer, plans)
    whole.run_training()
    expected = curves(whole), weights(whole), whole.history
    killed = tiny.make_trainer(UMITTokenizerTrainer, plans)
    kill_at(killed, 7)
    with pytest.raises(Killed):
        killed.run_training()
    again = tiny.make_trainer(UMITTokenizerTrainer, plans, resume=True)
    again.load_checkpoint(str(folder_of(again) / "checkpoint_latest.pth"))
    again.run_training()
    assert curves(again) == expected[0] and equal(weights(again), expected[1])
    assert again.history["perplexity"] == expected[2]["perplexity"]


@pytest.mark.parametrize("decays", [(0.05, 0.0), (0.0, 0.05)])
def test_weight_decay_of_a_continued_tokenizer_may_be_switched(
    prepare: Callable[..., dict], decays: tuple[float, float]
) -> None:
    plans = prepare(tokenizer={"weight_decay": decays[0]})
    tiny.make_trainer(UMITTokenizerTrainer, plans).run_training()
    section = plans["configurations"]["3d_fullres"]["umit"]["tokenizer"]
    section.update(weight_decay=decays[1], epochs=section["epochs"] + 1)
    longer = tiny.make_trainer(UMITTokenizerTrainer, plans, resume=True)
    longer.load_checkpoint(str(folder_of(longer) / "checkpoint_final.pth"))
    assert [group["weight_decay"] for group in longer.optimizer.param_groups[:2]] == [decays[1], 0.0]
    longer.run_training()


def test_killed_soft_token_pretraining_needs_nothing_but_its_checkpoint(prepare: Callable[..., dict]) -> None:
    plans = prepare(pretrain={"epochs": 3})
    source = finished_tokenizer(plans) / "checkpoint_final.pth"
    plans["configurations"]["3d_fullres"]["umit"]["pretrain"]["tokenizer"] = str(source)  # the other way to name it
    whole = tiny.make_trainer(UMITSoftTokenPretrainTrainer, plans)
    whole.run_training()
    expected = curves(whole), weights(whole)
    killed = tiny.make_trainer(UMITSoftTokenPretrainTrainer, plans)
    kill_at(killed, 7)
    with pytest.raises(Killed):
        killed.run_training()
    source.unlink()
    again = tiny.make_trainer(UMITSoftTokenPretrainTrainer, plans, resume=True)
    again.load_checkpoint(str(folder_of(again) / "checkpoint_latest.pth"))
    again.run_training()
    assert curves(again) == expected[0] and equal(weights(again), expected[1])
    assert bool(read_checkpoint(folder_of(again) / "checkpoint_final.pth")["network_weights"]["ready"])


def test_the_tokenizer_of_the_plans_is_read_at_the_beginning_only(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    source = finished_tokenizer(plans) / "checkpoint_final.pth"
    plans["configurations"]["3d_fullres"]["umit"]["pretrain"]["tokenizer"] = str(source)
    trainer = tiny.make_trainer(UMITSoftTokenPretrainTrainer, plans, resume=True)  # --c in an empty folder
    trainer.run_training()
    trainer.perform_actual_validation()
    card = json.loads((folder_of(trainer) / "card.json").read_text())
    assert card["pretrain"]["tokenizer"] == "checkpoint_final.pth", "no path of this machine: the card is published"
    source.unlink()
    validating = tiny.make_trainer(UMITSoftTokenPretrainTrainer, plans)  # --val
    validating.load_checkpoint(str(folder_of(trainer) / "checkpoint_final.pth"))
    assert equal(weights(validating), weights(trainer)) and bool(validating.model().ready)


def test_what_is_explained_is_held_against_the_codes_of_all_passes(prepare: Callable[..., dict]) -> None:
    """Two images of one code each: within an image nothing is left to know, over both an unsure network is wrong."""
    trainer = tiny.make_trainer(UMITSoftTokenPretrainTrainer, prepare())
    each = {"loss": 0.3, "cross-entropy": 0.3, "target entropy": 0.1, "accuracy": 1.0, "tokens": 8}
    figures = trainer.summarise([each | {"usage": [1.0, 0.0, 0.0]}, each | {"usage": [0.0, 1.0, 0.0]}])
    assert figures["information_explained"] == pytest.approx((math.log(2) - 0.3) / (math.log(2) - 0.1))
    assert figures["kl_divergence"] == pytest.approx(0.2)
    many, few = each | {"tokens": 9, "usage": [1.0, 0.0]}, each | {"tokens": 1, "usage": [0.0, 1.0]}
    knows = [
        one | {"loss": loss, "cross-entropy": loss} for one, loss in ((many, -math.log(0.9)), (few, -math.log(0.1)))
    ]
    assert trainer.summarise(knows)["information_explained"] == pytest.approx(0), "one who knows how often each occurs"


def test_without_a_tokenizer_nothing_begins(prepare: Callable[..., dict]) -> None:
    trainer = tiny.make_trainer(UMITSoftTokenPretrainTrainer, prepare())
    with pytest.raises(RuntimeError, match=r"UMITTokenizerTrainer.*-pretrained_weights.*umit.pretrain.tokenizer"):
        trainer.run_training()
    assert not (folder_of(trainer) / "checkpoint_latest.pth").exists()


def test_a_bad_discriminator_is_not_excused_by_a_good_tokenizer(
    prepare: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(network: TokenizerTraining, output: Any) -> torch.Tensor:
        return output.local * torch.nan

    monkeypatch.setattr(TokenizerTraining, "discriminator_loss", nowhere)
    options = {"discriminator": 0.01, "max_nonfinite": 4, "iterations_per_epoch": 9}
    trainer = tiny.make_trainer(UMITTokenizerTrainer, prepare(tokenizer=options))
    with pytest.raises(NonFiniteLossError, match="loss of the discriminator was not finite in 4 steps in a row"):
        trainer.run_training()


def test_a_collapse_is_warned_of_with_what_to_change(prepare: Callable[..., dict]) -> None:
    plans = prepare(tokenizer={"epochs": 1, "smallest_perplexity": 0.999})
    trainer = tiny.make_trainer(UMITTokenizerTrainer, plans)
    trainer.run_training()
    log = log_of(trainer)
    assert "WARNING: the codebook collapses" in log and "Raise umit.tokenizer.diversity" in log
