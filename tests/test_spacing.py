"""Anisotropy and the token grid: pumit.md §8 invariants 10 and 11 and the axis-order property (numbers only)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_umit.architectures.rope import token_positions
from nnunet_umit.spacing import Anisotropy, TokenGrid, token_grid

ratios = st.floats(min_value=1.0, max_value=32.0)


@pytest.mark.parametrize(
    ("ratio", "level"),
    [
        (0.3, 0),
        (1.0, 0),
        (1.99, 0),
        (2.0, 1),
        (3.9, 1),
        (4.0, 2),
        (5.55, 2),
        (15.9, 3),
        (16.0, 4),
        (31.99, 4),
        (32.0, 5),
        (999.0, 5),
    ],
)
def test_level_table(ratio: float, level: int) -> None:
    assert Anisotropy.from_spacing((ratio, 1.0, 1.0)).level == level


def test_level_of_2d_and_of_nnunets_2d_spacing() -> None:
    assert Anisotropy.from_spacing((1.0, 1.0)).level == 5
    assert Anisotropy.from_spacing((1.0, 1.0)).inverse_ratio == 0.0
    assert Anisotropy.from_spacing((999, 1, 1)).level == 5


@given(st.floats(0.1, 50), st.floats(0.1, 50), st.floats(0.1, 50), st.floats(0.01, 100))
def test_level_is_monotone_and_free_of_units(depth: float, height: float, width: float, scale: float) -> None:
    one = Anisotropy.from_spacing((depth, height, width))
    assert Anisotropy.from_spacing((depth * 2, height, width)).level >= one.level
    other = Anisotropy.from_spacing((depth * scale, height * scale, width * scale))
    assert math.isclose(other.ratio, one.ratio, rel_tol=2e-6)


@pytest.mark.parametrize(
    ("spacing", "level"), [((20.0, 1.0, 0.2), 5), ((4.8, 0.6, 0.6), 3), ((3.6, 0.9, 0.9), 2), ((2.2, 1.1, 1.1), 1)]
)
def test_a_calculated_spacing_has_the_level_of_the_exact_one(spacing: tuple[float, float, float], level: int) -> None:
    exact = Anisotropy.from_spacing(spacing)
    assert exact.level == level
    for factor in (1 + 1e-8, 1 - 1e-8):
        assert Anisotropy.from_spacing((spacing[0] * factor, *spacing[1:])) == exact
    assert Anisotropy.from_spacing([value * 0.1875 for value in spacing]) == exact


@given(ratios, st.sampled_from([4, 8, 16]))
def test_strides_multiply_to_the_token(ratio: float, size: int) -> None:
    anisotropy = Anisotropy(ratio)
    product = [math.prod(axis) for axis in zip(*anisotropy.strides(size), strict=True)]
    assert tuple(product) == anisotropy.token(size) == (max(size >> anisotropy.level, 1), size, size)


@given(ratios, st.integers(0, 6))
def test_ratio_left_after_halvings(ratio: float, halvings: int) -> None:
    anisotropy = Anisotropy(ratio)
    assert math.isclose(anisotropy.at(halvings).ratio, max(ratio / 2 ** min(halvings, anisotropy.level), 1.0))


@pytest.mark.parametrize("spacing", [(1.0,), (1, 1, 1, 1), (0, 1, 1), (1, -1, 1), (math.nan, 1, 1), (math.inf, 1, 1)])
def test_bad_spacing_is_named(spacing: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="spacing"):
        Anisotropy.from_spacing(spacing)


def test_bad_token_and_positions_are_named() -> None:
    with pytest.raises(ValueError, match="token size 6 is not a power of two|stride 6 is not a power of two"):
        Anisotropy(1.0).token(6)
    with pytest.raises(ValueError, match="'metres'"):
        token_grid((8, 8, 8), [(1, 1, 1)], 8, "metres")


@pytest.mark.parametrize("shape", list(itertools.permutations((3, 5, 7))))
def test_patchify_keeps_every_axis(shape: tuple[int, int, int]) -> None:
    token = (1, 2, 4)
    grid = TokenGrid((shape[0] * 1, shape[1] * 2, shape[2] * 4), token)
    image = torch.randn(2, 3, *grid.padded_size)
    patches = grid.patchify(image)
    assert patches.shape == (2, grid.tokens, 8 * 3)
    assert torch.equal(grid.unpatchify(patches, 3), image)
    for z, y, x in [(0, 0, 0), (2, 1, 2), (shape[0] - 1, shape[1] - 1, shape[2] - 1)]:
        index = (z * shape[1] + y) * shape[2] + x
        block = image[1, :, z : z + 1, y * 2 : y * 2 + 2, x * 4 : x * 4 + 4]
        assert torch.equal(patches[1, index].reshape(1, 2, 4, 3), block.permute(1, 2, 3, 0))
        hot = torch.zeros(1, grid.tokens, 1)
        hot[0, index] = 1.0
        assert grid.unflatten(hot)[0, 0, z, y, x] == 1.0
        assert grid.expand(hot[..., 0])[0, 0, z, y * 2 + 1, x * 4 + 3] == 1.0
        assert token_positions(grid)[0, index].tolist() == [z, y, x]


def test_padding_reaches_whole_tokens_and_is_cropped_again() -> None:
    grid = token_grid((9, 30, 33), [(5.0, 1.0, 1.0)], 8, "relative")
    assert grid.token == (2, 8, 8)
    assert grid.padded_size == (10, 32, 40)
    padded = grid.pad(torch.ones(1, 1, 9, 30, 33))
    assert tuple(padded.shape[2:]) == grid.padded_size
    assert padded[..., :9, :30, :33].min() == 1.0
    assert padded.sum() == 9 * 30 * 33
    assert grid.crop(padded).shape[2:] == (9, 30, 33)
    with pytest.raises(ValueError, match="does not fit"):
        grid.patchify(torch.ones(1, 1, 9, 30, 33))
    with pytest.raises(ValueError, match="does not fit"):
        grid.pad(torch.ones(1, 1, 10, 30, 33))


@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0, 6.4, 10.0])
def test_equal_millimetres_are_equal_positions(ratio: float) -> None:
    grid = token_grid((64, 64, 64), [(2.0 * ratio, 2.0, 2.0)], 8, "relative")
    millimetres_in_depth = grid.token[0] * 2.0 * ratio
    millimetres_in_plane = grid.token[1] * 2.0
    assert math.isclose(grid.steps[0][0], millimetres_in_depth / millimetres_in_plane)
    fine = token_grid((64, 64, 64), [(1.0, 1.0, 1.0)], 8, "mm")
    coarse = token_grid((64, 64, 64), [(2.0, 2.0, 2.0)], 8, "mm")
    assert token_positions(fine)[0, 2, 2] == token_positions(coarse)[0, 1, 2]
