"""Tokenizer and its losses: pumit.md §8, 3, 5 and 16; saturated logits, constant images, single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from nnunet_umit.architectures.encoder import SACViT
from nnunet_umit.architectures.image_losses import gradient_error, structural_dissimilarity
from nnunet_umit.architectures.native import append_spacing
from nnunet_umit.architectures.tokenizer import SoftTokenizer
from nnunet_umit.architectures.tokenizer_training import TokenizerTraining, load_tokenizer
from nnunet_umit.config import TokenizerConfig
from nnunet_umit.spacing import Anisotropy

LEVELS = [(1.0, 1.0, 1.0), (2.5, 1.0, 1.0), (4.0, 1.0, 1.0), (9.0, 1.0, 1.0), (20.0, 1.0, 1.0), (1.0, 1.0)]


def images(spacing: tuple[float, ...], batch: int = 2, channels: int = 1) -> Tensor:
    size = (17, 20) if len(spacing) == 2 else (max(16 >> Anisotropy.from_spacing(spacing).level, 1) + 1, 17, 20)
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def build(spacing: tuple[float, ...], token_size: int = 8, channels: int = 1, **options: Any) -> SoftTokenizer:
    torch.manual_seed(0)
    return SoftTokenizer(channels, spacing=spacing, token_size=token_size, dim=16, codes=8, **options)


def training(spacing: tuple[float, ...] = (1.0, 1.0, 1.0), token_size: int = 8, **config: Any) -> TokenizerTraining:
    arch = {"spacing": spacing, "token_size": token_size}
    torch.manual_seed(0)
    return TokenizerTraining.from_plan(1, arch, TokenizerConfig(dim=16, codes=8, **config))


@pytest.mark.parametrize("token_size", [4, 8, 16])
@pytest.mark.parametrize("spacing", LEVELS)
def test_its_grid_is_the_transformers_and_decoding_returns_to_the_image(
    spacing: tuple[float, ...], token_size: int
) -> None:
    tokenizer, image = build(spacing, token_size).eval(), images(spacing)
    view = tokenizer.view(image)
    encoder = SACViT(1, spacing=spacing, token_size=token_size, embed_dim=24, depth=1, num_heads=2)
    assert view.grid == encoder.grid(image)
    tokens = tokenizer.tokenize(view)
    assert tokens.probabilities.shape == (2, view.grid.tokens, 8)
    assert tokenizer.decode(tokens.codes, view).shape == image.shape
    alone = tokenizer.view(image[1:])
    torch.testing.assert_close(tokenizer.tokenize(alone).logits, tokens.logits[1:])  # samples do not see each other


@pytest.mark.parametrize("fidelity", ["exact", "pumit"])
def test_a_2d_image_is_a_volume_of_one_slice(fidelity: str) -> None:
    flat, deep = (build(spacing, fidelity=fidelity).eval() for spacing in ((1.0, 1.0), (999.0, 1.0, 1.0)))
    deep.load_state_dict(flat.state_dict())
    image = images((1.0, 1.0))
    one, other = flat.view(image), deep.view(image.unsqueeze(2))
    tokens, same = flat.tokenize(one), deep.tokenize(other)
    torch.testing.assert_close(tokens.logits, same.logits)
    torch.testing.assert_close(flat.decode(tokens.codes, one), deep.decode(same.codes, other).squeeze(2))


def test_a_token_does_not_depend_on_the_crop() -> None:
    """Norms look at one position: away from the border, a crop has the tokens of the whole (PUMIT's do not)."""
    tokenizer = build((1.0, 1.0)).eval()
    image = torch.randn(1, 1, 96, 96, generator=torch.Generator().manual_seed(1))
    whole = tokenizer.tokenize(tokenizer.view(image)).logits.view(12, 12, -1)
    part = tokenizer.tokenize(tokenizer.view(image[..., 16:80, 16:80])).logits.view(8, 8, -1)
    torch.testing.assert_close(part[2:-2, 2:-2], whole[4:8, 4:8])


@pytest.mark.parametrize(("level", "spacing"), list(enumerate(LEVELS)))
def test_running_statistics_are_those_of_the_level(level: int, spacing: tuple[float, ...]) -> None:
    tokenizer = build(spacing)
    tokenizer.tokenize(tokenizer.view(images(spacing)))
    assert tokenizer.quantiser.seen.nonzero().flatten().tolist() == [level]


def test_native_images_bring_their_spacing() -> None:
    fixed, native = build((4.0, 1.0, 1.0)).eval(), build((1.0, 1.0, 1.0), native=True).eval()
    native.load_state_dict(fixed.state_dict())
    image = images((4.0, 1.0, 1.0))
    told = torch.stack([append_spacing(each, (4.0, 1.0, 1.0)) for each in image])
    one, other = fixed.view(image), native.view(told)
    torch.testing.assert_close(fixed.tokenize(one).logits, native.tokenize(other).logits)


@pytest.mark.parametrize("quantiser", ["soft", "gumbel", "nearest"])
@pytest.mark.parametrize("spacing", [LEVELS[0], LEVELS[2], LEVELS[5]])
def test_every_parameter_learns(spacing: tuple[float, ...], quantiser: str) -> None:
    network = training(spacing, quantiser=quantiser, gradient=0.5, similarity=0.5)
    output = network(images(spacing))
    (output.local + output.pooled).backward()
    dead = [
        n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert dead == []


@pytest.mark.parametrize("quantiser", ["soft", "gumbel", "nearest"])
@pytest.mark.parametrize("case", ["saturated", "constant", "batch of one", "one token"])
def test_losses_and_gradients_stay_finite(quantiser: str, case: str) -> None:
    network = training(quantiser=quantiser, gradient=1.0, similarity=1.0)
    image = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    if case == "saturated" and quantiser != "nearest":
        with torch.no_grad():
            network.tokenizer.quantiser.scale.mul_(1e4)
    if case == "saturated" and quantiser == "nearest":
        with torch.no_grad():
            network.tokenizer.quantiser.codebook.mul_(1e4)
    if case == "constant":
        image = torch.full_like(image, 3.0)
    if case == "batch of one":
        image = image[:1]
    if case == "one token":
        image = image[:1, :, :8, :8, :8]
    output = network(image, 1e-6)
    loss = output.local + output.pooled
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_weights_of_the_terms_count() -> None:
    image = images((1.0, 1.0, 1.0))
    outputs = {}
    for name, config in {"none": {}, "sharp": {"sharpness": 2.0}, "diverse": {"diversity": 2.0}}.items():
        output = training(**{"sharpness": 0.0, "diversity": 0.0, "usage_momentum": 0.0, **config})(image)
        outputs[name] = output
    plain = outputs["none"]
    assert float(plain.pooled.detach()) == 0.0
    torch.testing.assert_close(plain.local, plain.losses.mean())
    difference = (outputs["sharp"].local - plain.local).detach()
    assert float(difference) == pytest.approx(2 * plain.measures["entropy"], rel=1e-4)
    usage = plain.usage
    assert float(outputs["diverse"].pooled) == pytest.approx(2 * float((usage * usage.log()).sum()), rel=1e-4)


def test_the_moving_average_of_the_usage_changes_the_value_and_not_the_flow() -> None:
    image = images((1.0, 1.0, 1.0))
    network = training(usage_momentum=0.5, diversity=1.0)
    first = network(image)
    expected = 0.5 * torch.full((8,), 1 / 8) + 0.5 * first.usage
    torch.testing.assert_close(network.usage, expected)
    assert float(first.pooled) == pytest.approx(float((expected * expected.log()).sum()), rel=1e-4)
    assert first.pooled.requires_grad
    network.eval()
    network(image)
    torch.testing.assert_close(network.usage, expected)  # evaluation does not move it


def test_a_batch_that_is_not_finite_leaves_no_trace() -> None:
    image = images((1.0, 1.0, 1.0))
    network = training(usage_momentum=0.5, discriminator=1.0)
    network.discriminator_loss(network(image))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    output = network(torch.full_like(image, torch.nan))
    assert not output.pooled.isfinite(), "the guard of the trainer skips the step"
    assert not network.discriminator_loss(output).isfinite()
    assert [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])] == []


def test_the_discriminator_is_heard_only_while_its_gate_is_open() -> None:
    image = images((1.0, 1.0, 1.0))
    network = training(discriminator=1.0)
    assert network.discriminator is not None
    output = network(image)
    shut = output.local.detach()
    network.discriminator.gate.fill_(0.01)
    output = network(image)
    (output.local + output.pooled).backward()
    assert not torch.equal(output.local.detach(), shut)
    assert all(parameter.grad is None for parameter in network.discriminator.parameters())  # held still
    network.zero_grad()
    loss = network.discriminator_loss(output)
    loss.backward()
    assert all(parameter.grad is None for parameter in network.tokenizer.parameters())
    assert float(network.discriminator.gate[0]) == pytest.approx(0.9 * 0.01 + 0.1 * float(loss), rel=1e-4)
    assert float(network.discriminator.gate[1]) == pytest.approx(float(loss))


def test_losses_and_gate_of_the_discriminator_are_float32_under_autocast() -> None:
    """As a GPU trains it; the products of its convolutions are bfloat16."""
    network, image = training(discriminator=1.0), images((1.0, 1.0, 1.0))
    assert network.discriminator is not None
    with torch.autocast("cpu", torch.bfloat16):
        loss = network.discriminator_loss(network(image))
        network.discriminator.gate.fill_(0.01)
        heard = network(image).local
    assert loss.dtype == heard.dtype == network.discriminator.gate.dtype == torch.float32


@pytest.mark.parametrize("shape", [(12, 14, 16), (1, 16, 18), (5, 16, 16)])
def test_similarity_is_that_of_a_well_known_library(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 1, *shape, generator=generator)
    made = image + 0.3 * torch.randn(1, 1, *shape, generator=generator)
    a, b = (np.asarray(each[0, 0], dtype=np.float64) for each in (image, made))
    if shape[0] == 1:
        a, b = a[0], b[0]
    if shape[0] != 5:  # the library has one window for all axes
        span = float(a.max() - a.min())
        wanted, picture = structural_similarity(
            a, b, win_size=7, data_range=span, use_sample_covariance=False, full=True
        )
        inner = tuple(slice(3, -3) for _ in a.shape)
        assert 1 - 2 * float(structural_dissimilarity(made, image)) == pytest.approx(
            float(picture[inner].mean()), abs=1e-4
        )
        assert wanted == pytest.approx(float(picture[inner].mean()), abs=1e-6)
    assert float(structural_dissimilarity(image, image)) == pytest.approx(0.0, abs=1e-6)
    assert 0 < float(structural_dissimilarity(made, image)) < 1


def test_gradient_error_sees_edges_and_not_offsets() -> None:
    image = torch.randn(2, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    isotropic = Anisotropy.from_spacing((1.0, 1.0, 1.0))
    torch.testing.assert_close(gradient_error(image + 5, image, isotropic), torch.zeros(2), atol=1e-5, rtol=0)
    step = torch.zeros(1, 1, 1, 1, 4)
    step[..., 2:] = 3.0  # one difference of 3 in three along the only axis; at half resolution one of one
    assert float(gradient_error(step, torch.zeros_like(step), Anisotropy.from_spacing((1.0, 1.0)))) == pytest.approx(
        1.0
    )


def test_a_tokenizer_of_another_architecture_is_refused(tmp_path: Path) -> None:
    network = training()
    file = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": network.state_dict()}, file)
    other = build((1.0, 1.0), 8)
    load_tokenizer(other, file)
    torch.testing.assert_close(other.state_dict()["out.weight"], network.tokenizer.state_dict()["out.weight"])
    with pytest.raises(ValueError, match=r"another architecture.*\"codes\": 8.*(here|there)"):
        load_tokenizer(build((1.0, 1.0), 16), file)
    torch.save({"network_weights": {"encoder.weight": torch.zeros(1)}}, file)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(other, file)
