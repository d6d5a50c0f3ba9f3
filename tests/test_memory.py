"""The memory model against real tensors, hand-made sums and a real training step."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunet_umit.architectures.unetr import UMITSegmenter
from nnunet_umit.plans.layout import Task
from nnunet_umit.plans.memory import predict_training_memory, saved_tensors, without_data

SPACINGS = {"isotropic": (1.0, 1.0, 1.0), "thick": (10.0, 1.56, 1.56), "planar": (1.0, 1.0)}


def _arch_kwargs(spacing: tuple[float, ...], size: str = "XS", token_size: int = 8, **changes: Any) -> dict[str, Any]:
    task = Task(spacing, (64.0,) * len(spacing), 1e6, 1, 3, 8e9)
    return task.arch_kwargs(size, token_size) | changes


@pytest.mark.parametrize(
    ("spacing", "token_size", "patch"),
    [("isotropic", 8, (16, 24, 16)), ("isotropic", 4, (12, 8, 8)), ("thick", 8, (6, 24, 32)), ("planar", 16, (64, 48))],
)
def test_run_without_data_saves_what_a_real_run_saves(spacing: str, token_size: int, patch: tuple[int, ...]) -> None:
    """The bound asked for is 25 %; on the versions this was written with the two agree to the byte."""
    arch_kwargs = _arch_kwargs(SPACINGS[spacing], "tiny", token_size)
    real = saved_tensors(UMITSegmenter(2, 3, **arch_kwargs).train(), torch.randn(2, 2, *patch))
    with without_data("full"):
        predicted = saved_tensors(UMITSegmenter(2, 3, **arch_kwargs).train(), torch.empty(2, 2, *patch))
    assert predicted.saved_bytes == pytest.approx(real.saved_bytes, rel=0.25)
    assert predicted.largest_bytes == pytest.approx(real.largest_bytes, rel=0.25)
    assert predicted.logit_shapes == real.logit_shapes
    assert torch.isfinite(UMITSegmenter(2, 3, **arch_kwargs)(torch.randn(1, 2, *patch))[0]).all()  # no fake left behind


def test_saved_bytes_of_a_chain_by_hand() -> None:
    """conv 1 -> 4, group norm, linear on 8 x 8 x 8 voxels: what each layer needs for its gradients, once."""
    chain = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1, bias=False), nn.GroupNorm(4, 4), nn.Linear(8, 8, bias=False))
    voxels = 8**3
    image = torch.empty(1, 1, 8, 8, 8, device="meta")
    full = saved_tensors(chain.to("meta"), image, "full")
    statistics = 2 * 4 * 4  # mean and reciprocal deviation of four channels, fp32
    assert full.saved_bytes == 4 * voxels + 4 * 4 * voxels + statistics + 4 * 4 * voxels
    mixed = saved_tensors(chain, image, "mixed")
    half_weights = 2 * (4 * 27 + 8 * 8)
    half_image, norm_input, half_linear_input = 2 * voxels, 4 * 4 * voxels, 2 * 4 * voxels
    assert mixed.saved_bytes == half_image + norm_input + statistics + half_linear_input + half_weights


def test_attention_is_counted_as_a_fused_kernel() -> None:
    """Linear in the tokens, not quadratic: twice the tokens take twice the memory."""

    class Attend(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(tokens, tokens, tokens)

    short, long = (
        saved_tensors(Attend(), torch.empty(1, 8, length, 32, device="meta", requires_grad=True)).saved_bytes
        for length in (1024, 2048)
    )
    assert long == 2 * short == 2 * (2 * 8 * 1024 * 32 * 4 + 8 * 1024 * 4)  # input, output, log-sum-exp


@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
def test_activations_grow_with_the_voxels(spacing: tuple[float, ...]) -> None:
    """What the patch search relies on."""
    arch_kwargs = _arch_kwargs(spacing, "tiny")
    small = (16, 64, 64)[-len(spacing) :]
    large = (32, 128, 96)[-len(spacing) :]
    factor = torch.Size(large).numel() / torch.Size(small).numel()
    predicted = predict_training_memory(arch_kwargs, small, 1, 3).scaled(factor).total(2)
    assert predicted == pytest.approx(predict_training_memory(arch_kwargs, large, 1, 3).total(2), rel=0.02)


def test_native_images_are_planned_with_their_full_size_logits() -> None:
    """Many classes: what fits where deep supervision is of low resolution does not where all of it is of full."""
    resampled = Task((1.0, 1.0, 1.0), (96.0,) * 3, 1e8, 1, 60, 6e9)
    native = replace(resampled, native=True)
    patches = [task.layout("tiny", 8) for task in (resampled, native)]
    assert math.prod(patches[1].patch) < math.prod(patches[0].patch)
    assert patches[1].memory.total(2) <= 6e9 and "native" not in patches[1].arch_kwargs
    as_trained = predict_training_memory({**patches[1].arch_kwargs, "native": True}, patches[1].patch, 1, 60)
    assert as_trained == patches[1].memory


def test_total_is_linear_in_the_batch_and_fitting_batch_inverts_it() -> None:
    memory = predict_training_memory(_arch_kwargs(SPACINGS["isotropic"]), (40, 56, 40), 1, 3)
    assert memory.total(5) - memory.total(4) == memory.total(2) - memory.total(1) == memory.sample_bytes
    assert memory.fitting_batch(memory.total(7)) == 7 and memory.fitting_batch(memory.total(7) - 1) == 6
    assert memory.fitting_batch(0) == 0
    assert 6.5e6 < memory.parameters < 7.5e6
    assert memory.total(0) > 16 * memory.parameters


def test_checkpointing_saves_memory() -> None:
    plain, checkpointed = (
        predict_training_memory(_arch_kwargs(SPACINGS["isotropic"], depth=4, checkpointing=flag), (32, 32, 32), 1, 3)
        for flag in (False, True)
    )
    assert checkpointed.sample_bytes < 0.9 * plain.sample_bytes


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="'bf16' is not one of mixed, full"):
        predict_training_memory(_arch_kwargs(SPACINGS["planar"]), (32, 32), 1, 2, "bf16")


@pytest.mark.end_to_end
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset the peak of a process")
def test_prediction_against_the_peak_of_a_real_step() -> None:
    from benchmarks.plan_memory import measure_training_memory

    arch_kwargs = _arch_kwargs(SPACINGS["isotropic"])
    measured = measure_training_memory(arch_kwargs, (40, 56, 40), 1, 3, 2)
    predicted = predict_training_memory(arch_kwargs, (40, 56, 40), 1, 3, "full").total(2)
    assert predicted == pytest.approx(measured, rel=0.25)
