"""Which axes may be mirrored follows from where the labels lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_umit.config import UMITConfig
from nnunet_umit.plans import orientation as module
from nnunet_umit.plans.orientation import Orientation, centres, orientation, read_orientation

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


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_along_which_two_classes_keep_their_order_is_not_mirrored(axis: int) -> None:
    apart = 4 if axis == 0 else 8
    found = decide([heart(axis, apart=apart)] * 6)
    assert found.mirrored == tuple(other for other in range(3) if other != axis)
    assert found.why == (f"left comes before right along axis {axis}",)
    assert decide([heart(axis, True, apart)] * 6).why == (f"right comes before left along axis {axis}",)


def test_classes_in_either_order_or_side_by_side_or_in_few_cases_forbid_nothing() -> None:
    assert decide([heart(1, swapped=number % 2 == 0) for number in range(10)]).mirrored == (0, 1, 2)
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


class Reader:
    """Stands in for nnU-Net's: the path is the label."""

    read: list[Any] = []

    def read_seg(self, label: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        self.read.append(label)
        return label[None], {}


def test_labels_are_read_in_the_axes_of_the_plans_and_only_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "read", [])
    dataset = {f"case{number}": {"label": heart(2)} for number in range(100)}
    labels = {"background": 0, "left": 1, "right": [2], "ignore": 3}
    assert read_orientation(dataset, labels, Reader, (2, 0, 1)).mirrored == (1, 2)
    assert module.CASES // 2 < len(Reader.read) <= module.CASES
    monkeypatch.setattr(Reader, "read", [])
    assert read_orientation(dataset, {"background": 0, "body": 1}, Reader, (0, 1, 2)) == Orientation((0, 1, 2))
    assert Reader.read == []


def test_the_plan_takes_it() -> None:
    assert UMITConfig.for_size("XS", mirror_axes=(2,)).to_dict()["finetune"]["mirror_axes"] == [2]


def test_real_labels(real_data: Path) -> None:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    expected = {"Dataset004_Hippocampus": (2,), "Dataset027_ACDC": (0, 1), "Dataset122_BraTS2013mini": (0, 1, 2)}
    labels = {"Dataset004_Hippocampus": 2, "Dataset027_ACDC": 3, "Dataset122_BraTS2013mini": 3}
    for name, mirrored in expected.items():
        files = sorted((real_data / name / "labelsTr").iterdir())
        dataset = {file.name: {"label": str(file)} for file in files}
        names = {str(value): value for value in range(1, labels[name] + 1)}
        assert read_orientation(dataset, names, SimpleITKIO, (0, 1, 2)).mirrored == mirrored
