"""Training on cases that keep their own grid: bit for bit after a kill, and each stage serves the next."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_training as tiny
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tiny_training import Killed, curves, equal, folder_of, kill_at, weights

from nnunet_umit.architectures.masking import TooFewTokensError
from nnunet_umit.plans.native import representative
from nnunet_umit.trainers import checkpoint as checkpoints
from nnunet_umit.trainers.finetune import UMITTrainer
from nnunet_umit.trainers.pretrain import UMITPretrainTrainer
from nnunet_umit.trainers.soft_tokens import UMITSoftTokenPretrainTrainer
from nnunet_umit.trainers.tokenizer import UMITTokenizerTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_native_images_are_not_compiled(native: Callable[..., dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_compile", "t")
    plans = native()
    for trainer_class in (UMITTrainer, UMITPretrainTrainer):
        told = tiny.make_trainer(trainer_class, plans)
        resampled = tiny.make_trainer(trainer_class, tiny.make_plans())
        for trainer in (told, resampled):
            trainer.device = torch.device("cuda")  # on a CPU, nnU-Net never compiles
        assert resampled._do_i_compile() and not told._do_i_compile()
        assert "every image of 3d_native has its own spacing" in tiny.log_of(told)


def test_the_plan_is_made_for_the_lowest_level() -> None:
    extent = representative([(8.0, 1.0, 1.0), (3.0, 1.0, 1.0), (9.0, 1.0, 1.0)], [(10, 100, 90)] * 3)
    assert extent.spacing == (3.0, 1.0, 1.0) and extent.shape == pytest.approx((80 / 3, 100, 90))
    turned = representative([(1.0, 1.0, 4.0)], [(100, 90, 10)])
    assert turned.spacing == (4.0, 1.0, 1.0) and turned.shape == (10, 100, 90)
    planar = representative([(999.0, 1.0, 1.0)], [(1, 300, 200)])
    assert planar.spacing == (1.0, 1.0) and planar.shape == (300, 200)


@pytest.mark.parametrize("trainer_class", [UMITPretrainTrainer, UMITTokenizerTrainer, UMITTrainer])
def test_native_training_continues_bit_for_bit(
    native: Callable[..., dict], nnunet_env: Any, monkeypatch: pytest.MonkeyPatch, trainer_class: type
) -> None:
    options = {"epochs": 3, "thicken": 0.5}
    if trainer_class is UMITTrainer:
        options["augmentation"] = "nnunet"
    plans = native(**{trainer_class.section: options})
    monkeypatch.setattr(trainer_class, "draw", lambda self: None)
    unbroken = tiny.make_trainer(trainer_class, plans)
    unbroken.run_training()
    monkeypatch.setenv("nnUNet_results", str(nnunet_env.results / "killed"))
    broken = tiny.make_trainer(trainer_class, plans)
    kill_at(broken, 4)
    with pytest.raises(Killed):
        broken.run_training()
    resumed = tiny.make_trainer(trainer_class, plans, resume=True)
    resumed.load_checkpoint(str(folder_of(resumed) / checkpoints.LATEST))
    resumed.run_training()
    assert curves(resumed) == curves(unbroken) and equal(weights(resumed), weights(unbroken))
    assert resumed.history == unbroken.history


def test_native_soft_tokens_cover_every_level(native: Callable[..., dict]) -> None:
    plans = native()
    tokenizer = tiny.make_trainer(UMITTokenizerTrainer, plans)
    tokenizer.run_training()
    tokenizer.perform_actual_validation()
    plans["configurations"]["3d_native"]["umit"]["pretrain"]["tokenizer"] = str(
        folder_of(tokenizer) / checkpoints.FINAL
    )
    pretrainer = tiny.make_trainer(UMITSoftTokenPretrainTrainer, plans)
    pretrainer.run_training()
    pretrainer.perform_actual_validation()
    for trainer in (tokenizer, pretrainer):
        assert set(trainer.history["group_losses"][0]) <= {"level 0", "level 2"}
        assert (folder_of(trainer) / "reconstructions.png").stat().st_size > 0
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.initialize()
    weights_file = folder_of(pretrainer) / "encoder.safetensors"
    assert trainer.network.load_umit_pretrained(str(weights_file)).fraction == 1.0


def test_native_pretraining_serves_native_finetuning_and_prediction(
    native: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = native()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as nnUNetv2_train sets it
    pretrainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    pretrainer.run_training()
    pretrainer.perform_actual_validation()
    assert not torch.backends.cudnn.benchmark, "cuDNN would try its algorithms for every batch"
    groups = pretrainer.history["group_losses"][0]
    assert set(groups) <= {"level 0", "level 2"} and sum(count for _, count in groups.values()) == 6
    assert (folder_of(pretrainer) / "reconstructions.png").stat().st_size > 0
    trainer = tiny.make_trainer(UMITTrainer, plans)
    trainer.initialize()
    report = trainer.network.load_umit_pretrained(str(folder_of(pretrainer) / "encoder.safetensors"))
    assert report.fraction == 1.0 and not report.adapted
    trainer.run_training()
    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, ("all",), checkpoints.FINAL)
    for number in range(4):  # four grids, none of them the plan's
        case = torch.from_numpy(trainer_case(trainer, f"case_{number:03d}"))
        assert predictor.predict_sliding_window_return_logits(case).shape == (3, *case.shape[1:])


def trainer_case(trainer: Any, key: str) -> np.ndarray:
    return trainer.dataset_class(trainer.preprocessed_dataset_folder).load_case(key)[0][:]


def test_an_image_of_one_token_is_named(nnunet_env: Any) -> None:
    plans = tiny.make_plans(native=True)
    tiny.write_preprocessed(nnunet_env.preprocessed, plans, cases=1, shape=(7, 7, 7), spacings=((1.0, 1.0, 1.0),))
    trainer = tiny.make_trainer(UMITPretrainTrainer, plans)
    with pytest.raises(TooFewTokensError, match="1 token.s. cannot be masked; .* leave such images out: case_000"):
        trainer.run_training()


def test_thickening_needs_a_network_that_can_be_told(prepare: Callable[..., dict]) -> None:
    plans = prepare(finetune={"thicken": 0.3})
    with pytest.raises(ValueError, match="set it to 0, or train 3d_native"):
        tiny.make_trainer(UMITTrainer, plans)
