"""The yardstick of masked pre-training: what interpolating the visible voxels explains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnunet_umit.architectures.interpolation import interpolate, interpolation_loss
from nnunet_umit.architectures.mae import MaskedAutoencoder
from nnunet_umit.architectures.masking import random_masking
from nnunet_umit.config import PretrainConfig
from nnunet_umit.spacing import TokenGrid

CASES = [((1.0, 1.0, 1.0), (17, 16, 24)), ((6.0, 1.0, 1.0), (5, 20, 24)), ((1.0, 1.0), (24, 40))]


def masked_pass(spacing: tuple[float, ...], image: torch.Tensor, mask_ratio: float = 0.5) -> Any:
    arch = {"token_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "stem": "patch", "spacing": list(spacing)}
    config = PretrainConfig(decoder_dim=16, decoder_heads=2, decoder_depth=1, mask_ratio=mask_ratio)
    mae = MaskedAutoencoder.from_arch_kwargs(1, arch, config)
    return mae(image, torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("spacing", "size"), CASES)
def test_it_explains_what_is_smooth_and_nothing_of_noise(spacing: tuple[float, ...], size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    along = [torch.linspace(0, 1, count) for count in size]
    smooth = sum(torch.meshgrid(*(slope * each for slope, each in zip((3, 1, 2), along, strict=False)), indexing="ij"))
    assert interpolation_loss(masked_pass(spacing, smooth.expand(2, 1, *size))) < 0.45
    noise = interpolation_loss(masked_pass(spacing, torch.randn(2, 1, *size)))
    assert 0.97 < noise < 1.0 + 1e-6


def test_visible_voxels_stay_and_a_constant_image_comes_back() -> None:
    grid = TokenGrid((16, 16, 24), (8, 8, 8))
    visible, _ = random_masking(2, grid.tokens, 0.75, torch.Generator().manual_seed(0))
    image = torch.randn(2, 3, 16, 16, 24)
    made = interpolate(image, visible, grid, [(1.0, 1.0, 1.0)])
    known = grid.expand(torch.zeros(2, grid.tokens).scatter(1, visible, 1.0)).expand_as(image) > 0
    assert torch.equal(made[known], image[known])
    constant = torch.full_like(image, 2.0)
    torch.testing.assert_close(interpolate(constant, visible, grid, [(1.0, 1.0, 1.0)]), constant)


def test_neighbours_count_by_their_distance_in_mm() -> None:
    """A hidden voxel in a slice of 0, between slices of 1: these count for 1/36 where they are six times as far."""
    grid = TokenGrid((3, 3, 3), (1, 1, 1))
    image = torch.zeros(1, 1, 3, 3, 3)
    image[0, 0, ::2] = 1.0
    visible = torch.tensor([[token for token in range(27) if token != 13]])
    isotropic = interpolate(image, visible, grid, [(1.0, 1.0, 1.0)])[0, 0, 1, 1, 1]
    thick = interpolate(image, visible, grid, [(6.0, 1.0, 1.0)])[0, 0, 1, 1, 1]
    assert isotropic.item() == pytest.approx(1 / 3) and thick.item() == pytest.approx(1 / 36 / (2 + 1 / 36))


def test_every_sample_has_its_own_spacing() -> None:
    grid = TokenGrid((3, 3, 3), (1, 1, 1))
    image = torch.randn(2, 1, 3, 3, 3)
    visible = torch.tensor([[token for token in range(27) if token != 13]] * 2)
    both = interpolate(image, visible, grid, [(6.0, 1.0, 1.0), (5.0, 1.0, 1.0)])
    torch.testing.assert_close(both[1:], interpolate(image[1:], visible[1:], grid, [(5.0, 1.0, 1.0)]))
    assert not torch.allclose(both[1:], interpolate(image[1:], visible[1:], grid, [(6.0, 1.0, 1.0)]))
