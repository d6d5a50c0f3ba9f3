"""Masked autoencoder: methods.md MAE-1 to MAE-10."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnunet_umit.architectures.interpolation import interpolation_loss
from nnunet_umit.architectures.mae import MaskedAutoencoder, normalise_patches
from nnunet_umit.architectures.masking import random_masking, visible_count
from nnunet_umit.config import PretrainConfig

SMALL: dict[str, Any] = {"token_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "stem_channels": (4, 6, 8)}
CASES = [
    ((1.0, 1.0, 1.0), "conv", (17, 16, 24)),
    ((1.0, 1.0, 1.0), "patch", (16, 16, 24)),
    ((6.0, 1.0, 1.0), "conv", (5, 20, 24)),
    ((6.0, 1.0, 1.0), "patch", (5, 20, 24)),
    ((1.0, 1.0), "conv", (24, 40)),
    ((1.0, 1.0), "patch", (24, 40)),
]


def build(spacing: tuple[float, ...], stem: str, channels: int = 2, **config: Any) -> MaskedAutoencoder:
    arch = {**SMALL, "spacing": list(spacing), "stem": stem, "decoder_channels": [4, 6, 8], "strides": []}
    config = {"decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1, **config}
    return MaskedAutoencoder.from_arch_kwargs(channels, arch, PretrainConfig(**config))


@pytest.mark.parametrize(
    ("tokens", "ratio", "visible"),
    [(216, 0.125, 189), (216, 0.75, 54), (512, 0.125, 448), (512, 0.875, 64), (196, 0.75, 49)],
)
def test_visible_counts(tokens: int, ratio: float, visible: int) -> None:
    assert visible_count(tokens, ratio) == visible


def test_masks_are_a_partition_differ_and_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    visible, hidden = random_masking(4000, 12, 0.75, generator)
    assert torch.equal(torch.cat((visible, hidden), 1).sort(1).values, torch.arange(12).expand(4000, 12))
    assert not torch.equal(visible[0], visible[1]) or not torch.equal(visible[1], visible[2])
    frequency = torch.bincount(visible.flatten(), minlength=12) / 4000
    assert (frequency - 0.25).abs().max() < 0.03
    again, _ = random_masking(4000, 12, 0.75, torch.Generator().manual_seed(0))
    assert torch.equal(visible, again)
    with pytest.raises(ValueError, match="1 token"):
        visible_count(1, 0.75)


@pytest.mark.parametrize(("spacing", "stem", "size"), CASES)
def test_every_parameter_learns(spacing: tuple[float, ...], stem: str, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mae = build(spacing, stem)
    output = mae(torch.randn(2, 2, *size))
    output.loss.backward()
    dead = [n for n, p in mae.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize(("spacing", "stem", "size"), CASES)
def test_targets_are_the_voxels_of_the_hidden_tokens(
    spacing: tuple[float, ...], stem: str, size: tuple[int, ...]
) -> None:
    mae = build(spacing, stem)
    image = torch.randn(1, 2, *size)
    output = mae(image)
    grid = output.grid
    padded = grid.pad(image)
    token = int(output.hidden[0, 0])
    z, y, x = (int(v) for v in torch.unravel_index(torch.tensor(token), grid.shape))
    d, h, w = grid.token
    block = padded[0, :, z * d : (z + 1) * d, y * h : (y + 1) * h, x * w : (x + 1) * w].permute(1, 2, 3, 0).flatten()
    torch.testing.assert_close(output.target[0, 0], normalise_patches(block)[0])
    assert output.prediction.shape == output.target.shape == (1, output.hidden.shape[1], d * h * w * 2)


def test_loss_looks_at_hidden_tokens_only() -> None:
    mae = build((1.0, 1.0, 1.0), "patch").eval()
    image = torch.randn(1, 2, 16, 16, 24)
    first = mae(image, torch.Generator().manual_seed(1))
    assert not torch.isin(first.hidden, first.visible).any()
    expected = (first.prediction - first.target).square().mean()
    torch.testing.assert_close(first.loss, expected)
    shown = first.grid.expand(torch.zeros(1, first.grid.tokens).scatter(1, first.visible, 1.0))
    mae.predict = lambda *given: first.target  # type: ignore[method-assign]  # whatever the encoder saw
    elsewhere = mae(image + 7 * torch.randn_like(image) * shown, masks=(first.visible, first.hidden))
    assert elsewhere.loss.item() == 0
    there = mae(image + torch.randn_like(image) * (1 - shown), masks=(first.visible, first.hidden))
    assert there.loss.item() > 0.1


def test_normalised_targets() -> None:
    patches = torch.randn(3, 5, 512) * 4 + 9
    target, mean, deviation = normalise_patches(patches)
    torch.testing.assert_close(target.mean(-1), torch.zeros(3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1, unbiased=False), torch.ones(3, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalise_patches(patches * 3.5 - 20)[0], target, atol=5e-4, rtol=0)
    torch.testing.assert_close(target * deviation + mean, patches, atol=1e-4, rtol=0)
    constant = normalise_patches(torch.full((1, 1, 512), 1.7e6))[0]
    assert torch.equal(constant, torch.zeros_like(constant))
    assert abs(target.square().mean().item() - 1) < 1e-3


def test_constant_images_give_zero_power_and_finite_gradients() -> None:
    mae = build((1.0, 1.0, 1.0), "conv")
    output = mae(torch.full((2, 2, 16, 16, 24), 5.0))
    output.loss.backward()
    assert output.target_power == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in mae.parameters())


@pytest.mark.parametrize(("spacing", "stem", "size"), CASES)
def test_a_perfect_prediction_restores_the_image(spacing: tuple[float, ...], stem: str, size: tuple[int, ...]) -> None:
    mae = build(spacing, stem).eval()
    image = torch.randn(2, 2, *size)
    plain = mae.predict

    def oracle(tokens: Any, visible: Any, hidden: Any, grid: Any, anisotropy: Any) -> torch.Tensor:
        plain(tokens, visible, hidden, grid, anisotropy)
        patches = grid.patchify(grid.pad(image))
        return normalise_patches(patches.gather(1, hidden.unsqueeze(-1).expand(-1, -1, patches.shape[-1])))[0]

    mae.predict = oracle  # type: ignore[method-assign]
    masked, reconstruction, output = mae.reconstruct(image)
    assert output.loss < 1e-10
    assert reconstruction.shape == image.shape
    torch.testing.assert_close(reconstruction, image, atol=1e-4, rtol=1e-4)
    assert torch.isnan(masked).any()
    torch.testing.assert_close(masked[~masked.isnan()], image[~masked.isnan()])


def test_pretraining_learns_structure() -> None:
    torch.manual_seed(0)
    mae = build((1.0, 1.0, 1.0), "conv", channels=1, decoder_dim=32, mask_ratio=0.5)
    axis = torch.linspace(0, 6.28, 24)
    optimiser = torch.optim.AdamW(mae.parameters(), 3e-3)
    losses = []
    for _ in range(120):
        phase = torch.rand(4, 1, 1, 1, 1) * 6.28
        image = torch.sin(axis[:, None, None] + phase) + torch.sin(axis[None, :, None] * 2) + torch.cos(axis)
        output = mae(image.reshape(4, 1, 24, 24, 24))
        loss, yardstick = output.loss, interpolation_loss(output)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 0.9  # nothing learned yet
    assert sum(losses[-10:]) / 10 < min(0.5, yardstick)


def test_bad_mask_ratio_is_named() -> None:
    with pytest.raises(ValueError, match=r"mask_ratio"):
        build((1.0, 1.0, 1.0), "conv", mask_ratio=1.0)
