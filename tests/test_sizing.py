"""Rules for token, patch, batch and network size: numbers only."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_umit.plans import sizing
from nnunet_umit.spacing import Anisotropy

ISOTROPIC, PLANAR = Anisotropy(1.0), Anisotropy(math.inf)


@pytest.mark.parametrize(
    ("median", "anisotropy", "expected"),
    [
        ((35, 50, 35), ISOTROPIC, 8),  # hippocampus: 175 tokens
        ((24, 24, 24), ISOTROPIC, 4),  # 27 tokens of 8 would be too few
        ((128, 128, 128), ISOTROPIC, 8),  # 4096, the limit itself
        ((160, 160, 128), ISOTROPIC, 16),  # 6400
        ((10, 256, 224), Anisotropy(6.4), 8),  # 4480: trimmed, not blurred
        ((36, 256, 256), Anisotropy(6.16), 16),  # 18432
        ((280, 235), PLANAR, 8),  # 1050
        ((512, 512), PLANAR, 16),
        ((50, 35), PLANAR, 4),
    ],
)
def test_token_size(median: tuple[int, ...], anisotropy: Anisotropy, expected: int) -> None:
    patch = sizing.pad_to_tokens(median, sizing.token_shape(8, anisotropy, len(median)))
    assert sizing.choose_token_size(patch, anisotropy) == expected


def test_hippocampus_patch() -> None:
    token = sizing.token_shape(8, ISOTROPIC, 3)
    patch = sizing.fit_patch((35, 50, 35), token, lambda patch: True)
    assert (token, patch, sizing.count_tokens(patch, token)) == ((8, 8, 8), (40, 56, 40), 175)


@given(
    median=st.lists(st.floats(1, 400), min_size=3, max_size=3),
    ratio=st.floats(1, 32),
    token_size=st.sampled_from(sizing.TOKEN_SIZES),
    voxels=st.integers(20_000, 10_000_000),
)
def test_patch_is_whole_tokens_within_the_median_and_fits(
    median: list[float], ratio: float, token_size: int, voxels: int
) -> None:
    token = sizing.token_shape(token_size, Anisotropy(ratio), 3)
    patch = sizing.fit_patch(median, token, lambda patch: math.prod(patch) <= voxels)
    assert math.prod(patch) <= voxels
    assert all(size % step == 0 and size >= step for size, step in zip(patch, token, strict=True))
    assert all(size - step < extent for size, extent, step in zip(patch, median, token, strict=True))


def test_patch_keeps_the_proportions_of_the_image() -> None:
    patch = sizing.fit_patch((400, 200, 100), (8, 8, 8), lambda patch: math.prod(patch) <= 1_000_000)
    assert patch[0] / patch[1] == pytest.approx(2, rel=0.1) and patch[1] / patch[2] == pytest.approx(2, rel=0.1)


def test_patch_that_never_fits() -> None:
    with pytest.raises(ValueError, match=r"one token \(8, 8, 8\)"):
        sizing.fit_patch((64, 64, 64), (8, 8, 8), lambda patch: False)


def test_patch_smaller_than_a_token_is_refused() -> None:
    sizing.check_patch((8, 16, 20), (8, 8, 8))
    with pytest.raises(ValueError, match=r"\(4, 64, 64\) is smaller than one token \(8, 8, 8\) along axis 0 \(4 < 8\)"):
        sizing.check_patch((4, 64, 64), (8, 8, 8))
    with pytest.raises(ValueError, match="has 2 axes"):
        sizing.check_patch((64, 64), (8, 8, 8))


@pytest.mark.parametrize(
    ("fitting", "tokens", "voxels", "planar", "expected"),
    [
        (9, 64, 1e8, False, 4),
        (3, 64, 1e8, False, 3),
        (0, 64, 1e8, False, 2),
        (9, 64, 1e6, False, 2),  # 5 % of the dataset
        (9, 175, 1e8, False, 4),  # hippocampus
        (9, 340, 1e8, False, 3),
        (9, 484, 1e8, False, 2),  # a heart: two samples bring a thousand tokens
        (9, 4096, 1e8, False, 2),
        (99, 441, 1e8, True, 16),
    ],
)
def test_batch_size(fitting: int, tokens: int, voxels: float, planar: bool, expected: int) -> None:
    assert sizing.choose_batch_size((32, 32, 32), tokens, voxels, fitting, planar) == expected


def test_network_size_follows_the_data_and_says_why() -> None:
    def never() -> bool:
        raise AssertionError("memory is asked for although B is no candidate")

    small, medium = sizing.choose_size(24_600, never), sizing.choose_size(3e6, never)
    assert small.size == "XS" and "24.6 thousand tokens" in small.why
    assert medium.size == "S" and "3 million" in medium.why
    assert sizing.choose_size(1e9, lambda: True).size == "B"
    without_memory = sizing.choose_size(1e9, lambda: False)
    assert without_memory.size == "S" and "does not fit" in without_memory.why
