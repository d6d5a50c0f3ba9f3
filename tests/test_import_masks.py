"""The body masks that stand in for labels of imported images."""

from __future__ import annotations

import numpy as np
import pytest
from corpus import body
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_umit.importing.mask import body_mask, otsu


def test_mask_of_a_body_in_air() -> None:
    image = body(0, (40, 210, 230))  # coarser than the image along two axes
    grids = np.meshgrid(*[np.linspace(-1, 1, size) for size in image.shape], indexing="ij")
    truth = sum(grid**2 for grid in grids) < 0.6
    image[20, 100:110, 110:120] = 0  # a hole
    image[2:5, :6, :6] = 900  # something beside the body
    image[0, 0, 0] = 30000  # one hot voxel
    mask = body_mask(image).astype(bool)
    overlap = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
    assert overlap > 0.95 and mask[20, 105, 115] and not mask[3, 3, 3]


@pytest.mark.parametrize(
    "image",
    [
        np.pad(np.ones((1, 1, 1)), ((5, 4), (9, 9), (9, 9))),  # one voxel of signal
        np.pad(-np.ones((4, 9, 9)), 6),  # negative in zeros: bright is what nnU-Net crops away
        np.concatenate([np.zeros((1, 12, 12)), np.ones((9, 12, 12))]),
        np.arange(800.0).reshape(8, 10, 10) + 1,
        np.arange(400.0).reshape(1, 20, 20) - 200,
        np.where(np.arange(1000).reshape(10, 10, 10) == 0, 0, 5),
    ],
    ids=["voxel", "negative", "step", "ramp", "slice", "all but one"],
)
def test_masks_survive_nnunets_cropping(image: np.ndarray) -> None:
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    mask = body_mask(image)
    assert mask.dtype == np.uint8 and mask.shape == image.shape and set(np.unique(mask)) == {0, 1}
    _, cropped, _ = crop_to_nonzero(image[None].astype(np.float32), mask[None].astype(np.float32))
    assert (cropped > 0).any()


@settings(max_examples=30)
@given(
    st.integers(0, 10**6), st.tuples(*[st.integers(1, 13)] * 2, st.integers(2, 13)), st.sampled_from([2, 3, 200, 65536])
)
def test_masks_are_never_empty_nor_full(seed: int, shape: tuple[int, int, int], levels: int) -> None:
    image = np.random.default_rng(seed).integers(-levels // 2, levels // 2, shape).astype(np.int32)
    image.flat[0] = levels  # not constant ...
    image.flat[-1] = 0
    mask = body_mask(image)
    assert ((mask == 1) & (image != 0)).any() and not mask.all()


def test_otsu_finds_the_gap() -> None:
    values = np.concatenate([np.full(900, 10.0), np.full(100, 200.0)])
    assert 60 < otsu(values) < 150
    assert otsu(np.full(10, 3.0)) == 3.0
