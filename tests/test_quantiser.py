"""Soft tokens and their regularisation: pumit.md §8, 12 to 15."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed

from nnunet_umit.architectures import quantiser as module
from nnunet_umit.architectures.quantiser import Quantiser, negative_entropy, perplexity, pooled_mean, token_entropy

CODES = 12


@given(seed=st.integers(0, 2**20), scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]))
def test_entropies_keep_their_bounds(seed: int, scale: float) -> None:
    logits = scale * torch.randn(3, 7, CODES, generator=torch.Generator().manual_seed(seed))
    sharpness = token_entropy(logits).mean()
    usage = logits.softmax(-1).flatten(0, 1).mean(0)
    diversity = negative_entropy(usage)
    assert -math.log(CODES) - 1e-5 <= diversity <= 1e-6
    assert -1e-6 <= sharpness <= math.log(CODES) + 1e-5
    assert diversity + sharpness <= 1e-5  # Jensen: the mean distribution is at least as uncertain as the mean token
    divergence = (usage * (usage.clamp_min(1e-30) * CODES).log()).sum()
    torch.testing.assert_close(diversity, divergence - math.log(CODES), atol=1e-5, rtol=1e-5)


def test_extremes_of_the_regularisation() -> None:
    uniform, single = torch.full((CODES,), 1 / CODES), torch.eye(CODES)[3]
    assert float(negative_entropy(uniform)) == pytest.approx(-math.log(CODES))
    assert float(negative_entropy(single)) == 0.0
    assert float(perplexity(uniform)) == pytest.approx(CODES) and float(perplexity(single)) == pytest.approx(1.0)
    assert float(token_entropy(torch.zeros(CODES))) == pytest.approx(math.log(CODES))


@pytest.mark.parametrize("mode", ["soft", "gumbel"])
def test_tokens_are_distributions_and_lie_in_the_hull_of_the_codebook(mode: str) -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(6, CODES, mode).eval()
    tokens = quantiser(torch.randn(2, 9, 6))
    torch.testing.assert_close(tokens.probabilities.sum(-1), torch.ones(2, 9))
    low, high = quantiser.codebook.amin(0), quantiser.codebook.amax(0)
    assert (tokens.codes >= low).all() and (tokens.codes <= high).all()
    torch.testing.assert_close(tokens.codes, tokens.probabilities @ quantiser.codebook)


@pytest.mark.parametrize("mode", ["soft", "gumbel"])
def test_large_logits_look_up_the_nearest_code(mode: str) -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(6, CODES, mode).eval()
    features = torch.randn(2, 9, 6)
    chosen = quantiser(features).logits.argmax(-1)
    with torch.no_grad():
        quantiser.project.weight.mul_(1e4)
    torch.testing.assert_close(quantiser(features).codes, quantiser.codebook[chosen], atol=1e-3, rtol=1e-3)


def test_nearest_is_the_nearest_and_passes_gradients_straight_through() -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(6, CODES, "nearest")
    torch.nn.init.normal_(quantiser.codebook)
    features = torch.randn(2, 9, 6, requires_grad=True)
    tokens = quantiser(features)
    wanted = torch.cdist(features, quantiser.codebook.expand(2, -1, -1)).argmin(-1)
    assert torch.equal(tokens.probabilities.argmax(-1), wanted)
    torch.testing.assert_close(tokens.codes, quantiser.codebook[wanted])
    tokens.codes.sum().backward(retain_graph=True)
    torch.testing.assert_close(features.grad, torch.ones_like(features))
    tokens.commitment.sum().backward()
    assert quantiser.codebook.grad is not None and quantiser.codebook.grad.any()


def test_gumbel_draws_one_code_in_training_only() -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(6, CODES, "gumbel")
    features = torch.randn(2, 9, 6)
    drawn = quantiser(features, 0.5).codes
    distance = torch.cdist(drawn, quantiser.codebook.expand(2, -1, -1)).amin(-1)
    torch.testing.assert_close(distance, torch.zeros(2, 9), atol=1e-4, rtol=0)
    assert not torch.allclose(drawn, quantiser(features, 0.5).codes)
    quantiser.eval()
    torch.testing.assert_close(quantiser(features).codes, quantiser(features).codes)


def test_saturated_logits_have_finite_losses_and_gradients() -> None:
    logits = 1e4 * torch.randn(1, 5, CODES, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    usage = pooled_mean(logits.softmax(-1))
    assert (usage == 0).any()  # the case that plain logarithms make NaN of
    loss = negative_entropy(usage) + token_entropy(logits).mean()
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("counts", [(6, 6), (3, 9), (1, 2, 9)])
def test_ranks_have_the_gradient_of_one_process(monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...]) -> None:
    """The mean over ranks of their gradients, as DDP makes it, is that of all tokens in one process."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, CODES, generator=generator, dtype=torch.float64, requires_grad=True)
    features = [torch.randn(1, count, 4, generator=generator, dtype=torch.float64) for count in counts]

    def probabilities(of: Tensor) -> Tensor:
        return (of @ weight).softmax(-1)

    whole = negative_entropy(pooled_mean(probabilities(torch.cat(features, 1))))
    wanted = torch.autograd.grad(whole, weight)[0]
    sums = sum(probabilities(each).detach().flatten(0, 1).sum(0) for each in features)
    everything = torch.cat((torch.as_tensor(sums), torch.tensor([float(sum(counts))], dtype=torch.float64)))

    def all_reduce(tensor: Tensor, *_: Any) -> None:
        tensor.copy_(everything)

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(module.distributed, "get_world_size", lambda: len(counts))
    monkeypatch.setattr(module.distributed, "all_reduce", all_reduce)
    losses = [negative_entropy(pooled_mean(probabilities(each))) for each in features]
    for loss in losses:
        torch.testing.assert_close(loss, whole)
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in losses]
    torch.testing.assert_close(torch.stack(gradients).mean(0), wanted)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="'sharp' is not one of soft, gumbel, nearest"):
        Quantiser(6, CODES, "sharp")
    with pytest.raises(ValueError, match="codebook of 1"):
        Quantiser(6, 1)


def alike(seed: int, tokens: int = 60) -> Tensor:
    """Features (2, L, 6) that share most of what they are."""
    generator = torch.Generator().manual_seed(seed)
    return 10 * torch.ones(6) + 0.1 * torch.randn(2, tokens, 6, generator=generator)


@pytest.mark.parametrize("mode", ["soft", "gumbel"])
def test_the_first_batch_gives_every_code_the_same_chance(mode: str) -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(6, CODES, mode).eval()
    before = quantiser(alike(0)).probabilities.flatten(0, 1).argmax(-1).unique()
    assert len(before) <= 2 and not quantiser.started, "what all features share decides; evaluation changes nothing"
    logits = quantiser.train()(alike(0)).logits.flatten(0, 1)
    torch.testing.assert_close(logits.mean(0), torch.zeros(CODES), atol=1e-3, rtol=0)
    torch.testing.assert_close(logits.std(0, unbiased=False), torch.full((CODES,), module.START), atol=1e-3, rtol=0)
    assert len(logits.argmax(-1).unique()) > CODES // 2
    weight = quantiser.project.weight.clone()
    quantiser(5 * alike(1))
    assert torch.equal(quantiser.project.weight, weight), "once"


def test_features_without_contrast_start_nothing() -> None:
    quantiser = Quantiser(6, CODES)
    weight = quantiser.project.weight.clone()
    assert quantiser(torch.ones(2, 5, 6)).codes.isfinite().all()
    assert not quantiser.started and torch.equal(quantiser.project.weight, weight)
    quantiser(alike(0))
    assert quantiser.started
