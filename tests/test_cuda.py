"""What only a GPU can show: it agrees with the CPU, compiled code with eager, seen memory with planned; trainings run.

Skipped where PyTorch finds no CUDA device.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic
import tiny_training as tiny
import torch
import torch.nn.functional as F
from tiny_training import GEOMETRIES, Killed, curves, folder_of, kill_at
from torch import Tensor, nn
from workspace import NAME, Workspace

from benchmarks import arithmetic, gpu_step
from nnunet_umit.architectures.mae import MaskedAutoencoder
from nnunet_umit.architectures.mim import SoftTokenModel
from nnunet_umit.architectures.tokenizer_training import TokenizerTraining
from nnunet_umit.architectures.unetr import UMITSegmenter
from nnunet_umit.config import PretrainConfig, TokenizerConfig
from nnunet_umit.plans.memory import CONTEXT_BYTES, predict_training_memory
from nnunet_umit.trainers.finetune import UMITTrainer
from nnunet_umit.trainers.pretrain import UMITPretrainTrainer
from nnunet_umit.trainers.soft_tokens import UMITSoftTokenPretrainTrainer
from nnunet_umit.trainers.tokenizer import UMITTokenizerTrainer

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
    pytest.mark.usefixtures("one_thread", "exact_products"),
]

SMALL: dict[str, Any] = {"token_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "stem_channels": [4, 6, 8]}
CASES = [
    ((1.0, 1.0, 1.0), (16, 24, 17)),
    ((2.5, 1.0, 1.0), (9, 20, 24)),
    ((9.0, 1.0, 1.0), (5, 20, 24)),
    ((1.0, 1.0), (24, 37)),
]


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Products and convolutions in float32, not in TF32."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


def arch(spacing: tuple[float, ...]) -> dict[str, Any]:
    return {**SMALL, "decoder_channels": [4, 6, 8], "strides": [], "stem": "conv", "spacing": list(spacing)}


def picture(size: tuple[int, ...]) -> Tensor:
    return torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1))


def segmenter(spacing: tuple[float, ...]) -> nn.Module:
    kwargs = arch(spacing)
    del kwargs["strides"]
    return UMITSegmenter(1, 3, **kwargs)


def segmentation_loss(forward: Callable[..., Any], image: Tensor) -> Tensor:
    """Of labels that depend on the place only."""
    total = image.new_zeros(())
    for logits in forward(image):
        target = torch.arange(logits[:, 0].numel(), device=logits.device).view_as(logits[:, 0]) % 3
        total = total + F.cross_entropy(logits.float(), target)
    return total


def autoencoder(spacing: tuple[float, ...]) -> nn.Module:
    return MaskedAutoencoder.from_arch_kwargs(1, arch(spacing), PretrainConfig(decoder_dim=16, decoder_heads=2))


def soft_token_model(spacing: tuple[float, ...]) -> nn.Module:
    config = TokenizerConfig(dim=16, codes=8)
    return SoftTokenModel.from_plan(1, arch(spacing), PretrainConfig(), config, ["ZScoreNormalization"])


def tokenizer(spacing: tuple[float, ...]) -> nn.Module:
    return TokenizerTraining.from_plan(1, arch(spacing), TokenizerConfig(dim=16, codes=8))


def masked_loss(forward: Callable[..., Any], image: Tensor) -> Tensor:
    """With masks from a generator of the CPU, as in training."""
    loss: Tensor = forward(image, torch.Generator().manual_seed(3)).loss
    return loss


def tokenizer_loss(forward: Callable[..., Any], image: Tensor) -> Tensor:
    output = forward(image)
    loss: Tensor = output.local + output.pooled
    return loss


MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Tensor]]] = {
    "segmenter": (segmenter, segmentation_loss),
    "masked autoencoder": (autoencoder, masked_loss),
    "soft-token model": (soft_token_model, masked_loss),
    "tokenizer": (tokenizer, tokenizer_loss),
}


def learn(network: nn.Module, loss: Callable[..., Tensor], image: Tensor, forward: Any = None) -> tuple[float, Any]:
    """Loss, and the gradient of every parameter on the CPU."""
    network.zero_grad()
    value = loss(network if forward is None else forward, image)
    value.backward()
    found = {name: each.grad.float().cpu() for name, each in network.named_parameters() if each.grad is not None}
    return float(value.detach()), found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients, as a share of the first one's norm."""
    assert one.keys() == other.keys()
    apart = math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))
    return apart / math.sqrt(sum(float(each.square().sum()) for each in one.values()))


@pytest.mark.parametrize(("spacing", "size"), CASES)
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradient_are_those_of_the_cpu(model: str, spacing: tuple[float, ...], size: tuple[int, ...]) -> None:
    build, loss = MODELS[model]
    torch.manual_seed(0)
    network, image = build(spacing), picture(size)
    value, gradient = learn(copy.deepcopy(network), loss, image)
    other, found = learn(network.to(DEVICE), loss, image.to(DEVICE))
    assert other == pytest.approx(value, rel=1e-4)
    assert distance(gradient, found) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("spacing", "size"), CASES)
@pytest.mark.parametrize("model", MODELS)
def test_autocast_is_close_to_full_precision(
    model: str, spacing: tuple[float, ...], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    build, loss = MODELS[model]
    torch.manual_seed(0)
    network, image = build(spacing).to(DEVICE), picture(size).to(DEVICE)
    value, gradient = learn(copy.deepcopy(network), loss, image)
    network.zero_grad()
    with torch.autocast(DEVICE.type, dtype=dtype):
        half = loss(network, image)
    (1024 * half).backward()  # as nnU-Net's scaler does, lest float16 loses small gradients
    found = {name: each.grad.float().cpu() / 1024 for name, each in network.named_parameters() if each.grad is not None}
    assert float(half) == pytest.approx(value, rel=0.02)
    assert distance(gradient, found) < 0.35  # the tokenizer's in bfloat16, emulated on a CPU: 0.25


@pytest.mark.parametrize(("spacing", "size"), CASES[1:])
@pytest.mark.parametrize("model", ["segmenter", "masked autoencoder"])
def test_compiled_is_eager(model: str, spacing: tuple[float, ...], size: tuple[int, ...]) -> None:
    build, loss = MODELS[model]
    torch.manual_seed(0)
    network, image = build(spacing).to(DEVICE), picture(size).to(DEVICE)
    value, gradient = learn(network, loss, image)
    torch.compiler.reset()
    other, found = learn(network, loss, image, forward=torch.compile(network))
    assert other == pytest.approx(value, rel=1e-4)
    assert distance(gradient, found) < 1e-3


@pytest.mark.parametrize("case", ["hippocampus, XS", "ACDC, XS"])
def test_planned_memory_is_about_what_a_step_takes(case: str) -> None:
    """Never less than three quarters of what is seen: a plan that does not fit stops a training on Friday night."""
    size, patch, spacing, token, batch = arithmetic.CASES[case]
    kwargs = arithmetic.arch_kwargs(size, spacing, token)
    planned = predict_training_memory(kwargs, patch, 1, arithmetic.CLASSES).total(batch) - CONTEXT_BYTES
    seen = gpu_step.peak_of(gpu_step.FINETUNE, case, DEVICE)[0]
    assert seen is not None and 0.75 < planned / seen < 2.0


# ---------------------------------------------------------------------------------------------------- trainings
def close(one: dict[str, list[float]], other: dict[str, list[float]]) -> bool:
    names = ("train_losses", "val_losses")
    return all(one[name] == pytest.approx(other[name], rel=0.02) for name in names) and one["lrs"] == other["lrs"]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("trainer_class", [UMITPretrainTrainer, UMITTokenizerTrainer, UMITTrainer])
def test_a_killed_training_continues_closely(
    prepare: Callable[..., dict], nnunet_env: Any, monkeypatch: pytest.MonkeyPatch, trainer_class: type, geometry: str
) -> None:
    plans = prepare(**GEOMETRIES[geometry])
    whole = tiny.make_trainer(trainer_class, plans, device=DEVICE)
    whole.run_training()
    if trainer_class is not UMITTrainer:  # these cases were never cropped, so nothing can be exported
        whole.perform_actual_validation()
    assert all(math.isfinite(loss) for loss in whole.logged("train_losses"))
    monkeypatch.setenv("nnUNet_results", str(nnunet_env.results / "killed"))
    killed = tiny.make_trainer(trainer_class, plans, device=DEVICE)
    kill_at(killed, 4)
    with pytest.raises(Killed):
        killed.run_training()
    again = tiny.make_trainer(trainer_class, plans, resume=True, device=DEVICE)
    again.load_checkpoint(str(folder_of(again) / "checkpoint_latest.pth"))
    assert again.current_epoch == 1
    again.run_training()
    assert close(curves(whole), curves(again))


def test_soft_tokens_reach_a_segmentation(prepare: Callable[..., dict]) -> None:
    plans = prepare()
    trainers = {}
    for source, trainer_class in (
        (None, UMITTokenizerTrainer),
        (UMITTokenizerTrainer, UMITSoftTokenPretrainTrainer),
        (UMITSoftTokenPretrainTrainer, UMITTrainer),
    ):
        trainer = trainers[trainer_class] = tiny.make_trainer(trainer_class, plans, device=DEVICE)
        trainer.initialize()
        if source is not None:
            trainer.network.load_umit_pretrained(str(folder_of(trainers[source]) / "checkpoint_final.pth"))
        trainer.run_training()
        assert all(math.isfinite(loss) for loss in trainer.logged("train_losses"))


def test_native_spacings_train(nnunet_env: Any) -> None:
    plans = tiny.make_plans(native=True)
    spacings = ((1.0, 1.0, 1.0), (4.0, 1.0, 1.0), (5.0, 0.8, 0.8), (1.0, 1.1, 4.5))
    tiny.write_preprocessed(nnunet_env.preprocessed, plans, spacings=spacings)
    for trainer_class in (UMITPretrainTrainer, UMITTrainer):
        trainer = tiny.make_trainer(trainer_class, plans, device=DEVICE)
        trainer.run_training()
        assert all(math.isfinite(loss) for loss in trainer.logged("train_losses"))


@pytest.mark.end_to_end
def test_stock_commands_compile_train_and_predict(tmp_path: Path) -> None:
    """nnU-Net compiles on a GPU unless it is told not to."""
    space = Workspace(tmp_path, device=DEVICE.type)
    synthetic.make_dataset(space.root / "raw", number=901, cases=5, test_cases=1, shape=(20, 24, 24))
    space.run(
        "nnUNetv2_plan_and_preprocess", "-d", "901", "-pl", "UMITPlanner", "-c", "3d_fullres", "-np", "1", "-npfp", "1"
    )
    path = space.root / "preprocessed" / NAME / "UMITPlans.json"
    plans = json.loads(path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["architecture"]["arch_kwargs"].update(embed_dim=24, depth=2, num_heads=2)
    for section in ("pretrain", "finetune"):
        configuration["umit"][section].update(epochs=2, iterations_per_epoch=3, val_iterations_per_epoch=1)
    path.write_text(json.dumps(plans))
    space.train("UMITPretrainTrainer", "all")
    source = space.fold("UMITPretrainTrainer", "all") / "checkpoint_final.pth"
    output = space.train("UMITTrainer", "0", "-pretrained_weights", str(source))
    assert "100.0 % of the encoder" in output and "Using torch.compile" in output
    predicted = tmp_path / "predicted"
    space.run(
        "nnUNetv2_predict", "-i", str(space.root / "raw" / NAME / "imagesTs"), "-o", str(predicted), "-d", "901",
        "-c", "3d_fullres", "-f", "0", "-tr", "UMITTrainer", "-p", "UMITPlans", "-device", DEVICE.type,
    )  # fmt: skip
    assert (predicted / "test_000.nii.gz").is_file()
