"""Which axes may be mirrored follows from where the labels lie."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_umit.config import UMITConfig
from nnunet_umit.plans import orientation as module
from nnunet_umit.plans.orientation import Orientation, centres, orientation

SHAPE = (8, 20, 16)


def heart(axis: int, swapped: bool = False, apart: int = 8) -> np.ndarray:
    """Two blocks in a row along an axis, in the middle of the others."""
    label = np.zeros(SHAPE, np.uint8)
    for value, start in ((1, 0), (2, apart)):
        place = [slice(2, 6)] * 3
        place[axis] = slice(start, start + 4)
        label[tuple(place)] = 3 - value if swapped else value
    return label


def decide(labels: list[np.ndarray], names: tuple[str, ...] = ("left", "right")) -> Orientation:
    return orientation(names, [centres(label, range(1, len(names) + 1)) for label in labels])


def test_centres_are_shares_of_the_extent_of_all_classes() -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[:, 4:8], label[:, 8:12] = 1, 2
    found = centres(label, [1, 2])
    np.testing.assert_allclose(found[0], (0.5, 0.25, 0.5))
    np.testing.assert_allclose(found[1], (0.5, 0.75, 0.5))
    assert centres(label, [[1, 2], 2]).keys() == {0, 1} and centres(0 * label, [1, 2]) == {}
    np.testing.assert_allclose(centres(label, [[1, 2], 2])[0], 0.5)
    assert centres(label, []) == {}, "a dataset without classes forbids nothing"


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_along_which_two_classes_keep_their_order_is_not_mirrored(axis: int) -> None:
    apart = 4 if axis == 0 else 8
    found = decide([heart(axis, apart=apart)] * 6)
    assert found.mirrored == tuple(other for other in range(3) if other != axis)
    assert found.why == (f"left comes before right along axis {axis}",)
    assert decide([heart(axis, True, apart)] * 6).why == (f"right comes before left along axis {axis}",)


def test_classes_in_either_order_or_side_by_side_or_in_few_cases_forbid_nothing() -> None:
    for every in (2, 4, 10):
        hearts = [heart(1, swapped=number % every == 0) for number in range(10 * every)]
        assert decide(hearts).mirrored == (0, 1, 2), "one in ten the other way round is still either order"
    assert decide([heart(1, swapped=number == 0) for number in range(21)]).mirrored == (0, 2)
    same = np.zeros(SHAPE, np.uint8)
    same[2:6, 2:18, 2:14], same[3:5, 6:14, 5:11] = 1, 2  # one within the other: a region of a tumour
    assert decide([same] * 10).mirrored == (0, 1, 2)
    assert decide([heart(1)] * (module.FEWEST - 1)).mirrored == (0, 1, 2)
    assert decide([]).mirrored == (0, 1, 2)


def test_the_pair_that_lies_furthest_apart_is_named() -> None:
    label = heart(1)
    label[2:6, 16:20, 2:6] = 3
    assert decide([label] * 6, ("a", "b", "c")).why == ("a comes before c along axis 1",)


def test_axes_within_slices() -> None:
    assert Orientation((0, 2), ("x",)).of_slices() == Orientation((1,), ("x",))


def test_the_plan_takes_it() -> None:
    assert UMITConfig.for_size("XS", mirror_axes=(2,)).to_dict()["finetune"]["mirror_axes"] == [2]
