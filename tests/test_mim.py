"""Masked soft-token modelling: pumit.md §8, 22 to 28."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nnunet_umit.architectures.masking import random_masking, spread
from nnunet_umit.architectures.mim import SoftTokenModel, soft_cross_entropy
from nnunet_umit.architectures.stem import take_tokens
from nnunet_umit.architectures.tokenizer_training import TokenizerTraining
from nnunet_umit.config import PretrainConfig, TokenizerConfig

SMALL: dict[str, Any] = {"token_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "stem_channels": (4, 6, 8)}
TOKENIZER = TokenizerConfig(dim=16, codes=8)
CASES = [
    ((1.0, 1.0, 1.0), "conv", (16, 17, 24)),
    ((1.0, 1.0, 1.0), "patch", (16, 17, 24)),
    ((6.0, 1.0, 1.0), "conv", (5, 16, 24)),
    ((1.0, 1.0), "conv", (24, 32)),
    ((1.0, 1.0), "patch", (24, 32)),
]


def build(spacing: tuple[float, ...] = (1.0, 1.0, 1.0), stem: str = "conv", **config: Any) -> SoftTokenModel:
    torch.manual_seed(0)
    arch = {**SMALL, "spacing": list(spacing), "stem": stem}
    return SoftTokenModel.from_plan(1, arch, PretrainConfig(**config), TOKENIZER, ["ZScoreNormalization"])


def picture(size: tuple[int, ...], batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("spacing", "stem", "size"), CASES)
def test_hidden_voxels_do_not_matter(spacing: tuple[float, ...], stem: str, size: tuple[int, ...]) -> None:
    model, image = build(spacing, stem).eval(), picture(size)
    view = model.tokenizer.view(image)
    masks = random_masking(2, view.grid.tokens, 0.6, torch.Generator().manual_seed(0))
    hidden = view.padded.new_zeros(2, view.grid.tokens).scatter(1, masks[1], 1.0)
    other = image + 7 * view.like_image(view.grid.expand(hidden).expand_as(view.padded))
    torch.testing.assert_close(model(image, masks=masks).logits, model(other, masks=masks).logits)
    shown = image + 7 * (1 - view.like_image(view.grid.expand(hidden).expand_as(view.padded)))
    assert not torch.allclose(model(image, masks=masks).logits, model(shown, masks=masks).logits)


@pytest.mark.parametrize(("spacing", "stem", "size"), CASES)
def test_with_everything_visible_it_is_the_plain_encoder(
    spacing: tuple[float, ...], stem: str, size: tuple[int, ...]
) -> None:
    model, image = build(spacing, stem).eval(), picture(size)
    view = model.tokenizer.view(image)
    everything = torch.arange(view.grid.tokens).expand(2, -1)
    encoded = model.encode(view, everything, everything[:, :0])
    torch.testing.assert_close(encoded, model.encoder(image).tokens)


def test_masks_differ_by_sample_and_repeat_by_seed() -> None:
    model, image = build(mask_ratio=0.55).eval(), picture((40, 40, 40), batch=3)
    output = model(image, torch.Generator().manual_seed(5))
    assert output.visible.shape[1] == 56 and output.hidden.shape[1] == 69  # floor(125 * 0.45)
    assert not torch.equal(output.visible[0], output.visible[1])
    assert torch.equal(output.visible, model(image, torch.Generator().manual_seed(5)).visible)


@pytest.mark.parametrize("positions", [True, False])
def test_hidden_places_hold_the_mask_token_until_the_last_layers(positions: bool) -> None:
    """What the first block that sees them gets: mask tokens, with a position or without, on top of what is near."""
    model, image = build(mask_layers=1, mask_positions=positions).eval(), picture((16, 16, 24))
    seen: list[Tensor] = []
    blocks = model.encoder.transformer.blocks
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    output = model(image, torch.Generator().manual_seed(0))
    lengths = [tokens.shape[1] for tokens in seen]
    assert lengths == [output.visible.shape[1]] * 2 + [output.view.grid.tokens]
    grid, (_, shown, given) = output.view.grid, seen
    before = blocks[1](shown, model.encoder.rope(grid, output.visible, image.device))
    rest = take_tokens(given - spread(before, output.visible, grid), output.hidden)
    alike = (rest - model.mask_token).abs().amax() < 1e-5
    assert bool(alike) is not positions


def test_positions_on_mask_tokens_matter_only_where_they_are_asked_for() -> None:
    image = picture((16, 16, 24))
    masks = random_masking(2, 12, 0.6, torch.Generator().manual_seed(0))
    model = build(mask_positions=True).eval()
    before = model(image, masks=masks).logits
    with torch.no_grad():
        model.mask_position.mul_(50)  # type: ignore[union-attr]
    assert not torch.allclose(before, model(image, masks=masks).logits)
    assert not any("mask_position" in name for name in build(mask_positions=False).state_dict())


@given(seed=st.integers(0, 2**20), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_cross_entropy_is_least_at_the_target(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    target_logits, logits = (scale * torch.randn(5, 8, generator=generator) for _ in range(2))
    target = target_logits.softmax(-1)
    entropy = -(target * target_logits.log_softmax(-1)).sum(-1)
    assert (soft_cross_entropy(logits, target) >= entropy - 1e-5).all()
    torch.testing.assert_close(soft_cross_entropy(target_logits, target), entropy, atol=1e-5, rtol=1e-5)
    divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)
    torch.testing.assert_close(soft_cross_entropy(logits, target) - entropy, divergence, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("spacing", "stem", "size"), CASES)
def test_everything_learns_but_the_tokenizer(spacing: tuple[float, ...], stem: str, size: tuple[int, ...]) -> None:
    model = build(spacing, stem)
    assert model.train() is model and model.training and not model.tokenizer.training
    assert model.eval() is model
    model.train()
    model(picture(size)).loss.backward()
    for name, parameter in model.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.any())
        assert learns is not name.startswith("tokenizer."), name


def test_what_the_pictures_show() -> None:
    model, image = build().eval(), picture((16, 17, 24), batch=1)
    shown, output = model.reconstruct(image, torch.Generator().manual_seed(0))
    assert len(shown) == 4 and all(each.shape == image.shape for each in shown)
    assert torch.equal(shown[0], image)
    hidden = shown[1].isnan()
    assert 0 < hidden.float().mean() < 1 and torch.equal(shown[1][~hidden], image[~hidden])
    assert not shown[2].isnan().any() and not torch.equal(shown[2], shown[3])
    assert output.logits.shape == (1, output.hidden.shape[1], 8)


def checkpoint(folder: Path, normalisation: str = "ZScoreNormalization", seed: int = 3, **config: Any) -> Path:
    arch = {"spacing": (1.0, 1.0, 1.0), "token_size": 8}
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    network = TokenizerTraining.from_plan(1, arch, TokenizerConfig(**{"dim": 16, "codes": 8, **config}))
    plans = {"configurations": {"base": {"normalization_schemes": [normalisation]}, "own": {"inherits_from": "base"}}}
    content = {"network_weights": network.state_dict(), "init_args": {"plans": plans, "configuration": "own"}}
    torch.save(content, folder / "checkpoint_final.pth")
    return folder / "checkpoint_final.pth"


def test_the_tokenizer_comes_with_pretrained_weights(tmp_path: Path) -> None:
    model, file = build(), checkpoint(tmp_path)
    assert not model.ready
    model.load_umit_pretrained(str(file))
    stored = torch.load(file, weights_only=True)["network_weights"]
    assert model.ready
    assert all(torch.equal(value, stored["tokenizer." + name]) for name, value in model.tokenizer.state_dict().items())


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_a_checkpoint_of_its_own_kind_brings_the_encoder_and_a_tokenizer_where_there_is_none(
    tmp_path: Path, has_tokenizer: bool
) -> None:
    first, second = checkpoint(tmp_path / "first"), checkpoint(tmp_path / "second", seed=4)
    source, model = build(), build()
    source.load_umit_pretrained(str(second))
    with torch.no_grad():
        for parameter in source.encoder.parameters():
            parameter.add_(1)
    content = torch.load(second, weights_only=True) | {"network_weights": source.state_dict()}
    torch.save(content, tmp_path / "soft_tokens.pth")
    if has_tokenizer:
        model.load_umit_pretrained(str(first))
    report = model.load_umit_pretrained(str(tmp_path / "soft_tokens.pth"))
    assert report is not None and report.fraction == 1.0 and model.ready
    assert not [name for name in (*report.new, *report.unused) if name.startswith("tokenizer.") or name == "ready"]
    assert all(
        torch.equal(value, source.encoder.state_dict()[name]) for name, value in model.encoder.state_dict().items()
    )
    stored = torch.load(first if has_tokenizer else second, weights_only=True)["network_weights"]
    assert all(torch.equal(value, stored["tokenizer." + name]) for name, value in model.tokenizer.state_dict().items())


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = build()
    with pytest.raises(ValueError, match="normalisation CTNormalization.*normalised by ZScoreNormalization"):
        model.load_umit_pretrained(str(checkpoint(tmp_path, "CTNormalization")))
    with pytest.raises(ValueError, match="another architecture"):
        model.load_umit_pretrained(str(checkpoint(tmp_path, codes=16)))
    torch.save({"network_weights": {"encoder.x": torch.zeros(1)}}, tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        model.load_umit_pretrained(str(tmp_path / "encoder.pth"))
    assert not model.ready
    with pytest.raises(ValueError, match="mask_layers 4 must be from 1 to 3"):
        build(mask_layers=4)
