"""Soft tokens and their regularisation: pumit.md §8, 12 to 15."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed

from nnunet_umit.architectures import quantiser as module
from nnunet_umit.architectures.quantiser import Quantiser, negative_entropy, perplexity, pooled_mean, token_entropy

CODES = 12
T = TypeVar("T")


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
        quantiser.scale.mul_(1e4)
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


def on_ranks(monkeypatch: pytest.MonkeyPatch, calls: list[Callable[[], T]]) -> list[T]:
    """What the calls return, each in a thread that stands for a rank: sums over ranks wait for all of them."""
    count = len(calls)
    barrier, board = threading.Barrier(count), [torch.zeros(0)] * count
    own = threading.local()

    def all_reduce(values: Tensor) -> None:
        board[own.rank] = values.clone()
        barrier.wait(60)
        total = torch.stack(board).sum(0)
        barrier.wait(60)
        values.copy_(total)

    def call(rank: int) -> T:
        own.rank = rank
        return calls[rank]()

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    with ThreadPoolExecutor(count) as ranks:
        return list(ranks.map(call, range(count)))


@pytest.mark.parametrize("counts", [(6, 6), (3, 9), (1, 2, 9)])
def test_ranks_have_the_gradient_of_one_process(monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...]) -> None:
    """The mean over ranks of their gradients, as DDP makes it, is that of all tokens in one process."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, CODES, generator=generator, dtype=torch.float64, requires_grad=True)
    features = [torch.randn(1, count, 4, generator=generator, dtype=torch.float64) for count in counts]

    def probabilities(of: Tensor) -> Tensor:
        return (of @ weight).softmax(-1)

    def loss_and_gradient(of: Tensor) -> tuple[Tensor, Tensor]:
        loss = negative_entropy(pooled_mean(probabilities(of)))
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    whole, wanted = loss_and_gradient(torch.cat(features, 1))
    found = on_ranks(monkeypatch, [partial(loss_and_gradient, each) for each in features])
    for loss, _ in found:
        torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.stack([gradient for _, gradient in found]).mean(0), wanted)


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
def test_every_code_has_the_same_chance(mode: str) -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(6, CODES, mode)
    raw = quantiser.project(alike(0)).flatten(0, 1)
    assert len(raw.argmax(-1).unique()) <= 2, "what all features share decides"
    logits = quantiser(alike(0)).logits.flatten(0, 1)
    torch.testing.assert_close(logits.mean(0), torch.zeros(CODES), atol=1e-3, rtol=0)
    # the floor under the variance costs the flattest codes some of their spread
    spread = module.SCALE * (raw.var(0, unbiased=False) / (raw.var(0, unbiased=False) + module.FLAT)).sqrt()
    torch.testing.assert_close(logits.std(0, unbiased=False), spread, atol=1e-3, rtol=0)
    assert len(logits.argmax(-1).unique()) > CODES // 2


def test_afterwards_a_token_depends_on_itself_only() -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(6, CODES)
    batches = [alike(seed) for seed in range(3)]
    for batch in batches:
        quantiser(batch)
    raw = quantiser.project(torch.stack(batches)).flatten(0, 2)
    torch.testing.assert_close(quantiser.mean[0], raw.mean(0), atol=1e-4, rtol=1e-4)
    quantiser.eval()
    before = quantiser.mean.clone()
    whole = quantiser(batches[0]).probabilities
    torch.testing.assert_close(quantiser(batches[0][:1, :7]).probabilities, whole[:1, :7])
    assert torch.equal(quantiser.mean, before), "evaluation changes nothing"


def test_every_level_has_statistics_of_its_own() -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(6, CODES)
    thin, thick = alike(0), 5 + 3 * alike(1)
    of_thin, of_thick = quantiser(thin, level=0).logits, quantiser(thick, level=3).logits
    quantiser.eval()
    torch.testing.assert_close(quantiser(thin, level=0).logits, of_thin)
    torch.testing.assert_close(quantiser(thick, level=3).logits, of_thick)
    for level, nearest in ((1, 0), (2, 3), (5, 3)):  # none was seen: the nearest counts
        assert torch.equal(quantiser(thin, level=level).logits, quantiser(thin, level=nearest).logits)


def test_a_batch_that_is_not_finite_leaves_no_trace() -> None:
    quantiser = Quantiser(6, CODES)
    quantiser(alike(0))
    before = {name: value.clone() for name, value in quantiser.state_dict().items()}
    quantiser(torch.full((2, 5, 6), torch.nan))
    assert all(torch.equal(value, before[name]) for name, value in quantiser.state_dict().items())


def test_features_without_contrast_tell_nothing() -> None:
    tokens = Quantiser(6, CODES)(torch.ones(2, 5, 6))
    torch.testing.assert_close(tokens.probabilities, torch.full((2, 5, CODES), 1 / CODES))


def test_standardised_over_ranks_as_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of the ranks add up to that of one process, and so do their gradients."""
    torch.manual_seed(0)
    parts, factor = (alike(0, 7)[:1].double(), 2 * alike(1, 3)[:1].double()), torch.randn(CODES, dtype=torch.float64)
    weight = torch.randn(6, CODES, dtype=torch.float64, requires_grad=True)

    def loss_and_gradient(features: Tensor) -> tuple[Tensor, Tensor]:
        logits = Quantiser(6, CODES).double().standardised(features @ weight)
        loss = ((logits / module.SCALE).sin() * factor).sum()
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    whole, wanted = loss_and_gradient(torch.cat(parts, 1))
    found = on_ranks(monkeypatch, [partial(loss_and_gradient, each) for each in parts])
    torch.testing.assert_close(found[0][0] + found[1][0], whole)
    torch.testing.assert_close(found[0][1] + found[1][1], wanted)


def test_training_does_not_fade_to_one_code() -> None:
    """Features that share most of themselves, all layers learning: with logits that are only projected this ends at a
    perplexity of 1."""
    torch.manual_seed(0)
    quantiser = Quantiser(32, CODES)
    encoder, decoder = torch.nn.Linear(6, 32), torch.nn.Linear(32, 6)
    learned = [*quantiser.parameters(), *encoder.parameters(), *decoder.parameters()]
    optimiser = torch.optim.Adam(learned, 1e-2)
    usage = torch.ones(CODES)
    for step in range(150):
        inputs = alike(step)
        tokens = quantiser(encoder(inputs).relu())
        usage = pooled_mean(tokens.probabilities)
        loss = (decoder(tokens.codes) - inputs).abs().mean()
        loss = loss + 0.1 * negative_entropy(usage) + 0.03 * token_entropy(tokens.logits).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(perplexity(usage.detach())) > CODES / 2
