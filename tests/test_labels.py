"""What the planner reads out of labels: files in their own axes, only some of them, and the reach of a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_umit.plans import labels as module
from nnunet_umit.plans.labels import Foreground, read_foreground
from nnunet_umit.plans.orientation import Orientation

ALL = Orientation((0, 1, 2))


def heart() -> np.ndarray:
    """Two blocks in a row along the last axis."""
    label = np.zeros((8, 20, 16), np.uint8)
    label[2:6, 2:12, 0:4], label[2:6, 2:12, 8:12] = 1, 2
    return label


class Reader:
    """Stands in for nnU-Net's: the path is the label."""

    read: list[Any] = []

    def read_seg(self, label: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        self.read.append(label)
        return label[None], {"spacing": [1.0, 2.0, 3.0]}


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "read", [])


def test_labels_are_read_in_the_axes_of_the_plans_and_only_some() -> None:
    dataset = {f"case{number}": {"label": heart()} for number in range(100)}
    labels = {"background": 0, "left": 1, "right": [2], "ignore": 3}
    found = read_foreground(dataset, labels, Reader, (2, 0, 1))
    assert found.orientation.mirrored == (1, 2)
    assert set(found.extents) == {(36.0, 4.0, 20.0)} and set(found.spacings) == {(3.0, 1.0, 2.0)}
    assert module.CASES // 2 < len(Reader.read) == len(found.extents) <= module.CASES


def test_a_label_of_one_slice_reaches_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its header says of a thickness: the thick axis is the one that has no depth."""
    label = np.zeros((1, 300, 400), np.uint8)
    label[:, :290, :100] = 1
    monkeypatch.setattr(Reader, "read_seg", lambda self, file: (label[None], {"spacing": [1.0, 1.5, 1.5]}))
    found = read_foreground({"a": {"label": "a"}}, {"background": 0, "one": 1}, Reader, (0, 1, 2))
    assert found.native_reach((1.5, 1.5)) == found.reach((1.5, 1.5)) == (580.0, 200.0)


def test_empty_and_ignored_labels_reach_nowhere() -> None:
    ignored = np.full((4, 4, 4), 3, np.uint8)
    found = read_foreground({"a": {"label": ignored}}, {"background": 0, "one": 1, "ignore": 3}, Reader, (0, 1, 2))
    assert found == Foreground(ALL) and found.reach((1.0, 1.0, 1.0)) is None


def test_a_patch_reaches_twice_as_far_as_nearly_every_foreground() -> None:
    """In voxels of the planned spacing, never below the usual patch; slices have the last two axes only."""
    extents = tuple((100.0, 200.0 + index, 300.0) for index in range(21))
    found = Foreground(ALL, extents, ((8.0, 1.0, 1.5),) * 21)
    assert found.reach((5.0, 1.0, 2.0)) == (module.SHORTEST, 2 * 219.0, 300.0)
    assert found.reach((1.0, 2.0)) == (2 * 219.0, 300.0)


def test_native_images_reach_along_their_own_thick_axis() -> None:
    found = Foreground(ALL, ((300.0, 400.0, 500.0),), ((1.0, 1.0, 5.0),))
    assert found.native_reach((1.0, 1.0, 1.0)) == (1000.0, 600.0, 800.0)


def test_real_labels(real_data: Path) -> None:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    expected = {"Dataset004_Hippocampus": (2,), "Dataset027_ACDC": (0, 1), "Dataset122_BraTS2013mini": (0, 1, 2)}
    classes = {"Dataset004_Hippocampus": 2, "Dataset027_ACDC": 3, "Dataset122_BraTS2013mini": 3}
    for name, mirrored in expected.items():
        files = sorted((real_data / name / "labelsTr").iterdir())
        dataset = {file.name: {"label": str(file)} for file in files}
        names = {str(value): value for value in range(1, classes[name] + 1)}
        found = read_foreground(dataset, names, SimpleITKIO, (0, 1, 2))
        assert found.orientation.mirrored == mirrored
        if name == "Dataset027_ACDC":
            assert found.reach((6.95, 1.5625, 1.5625)) == pytest.approx((128, 160, 163), abs=4)
