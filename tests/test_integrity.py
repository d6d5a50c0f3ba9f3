"""Bad input is refused with file, value, limit and fix: bytes, voxels, labels, whole datasets."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_umit.plans import integrity
from nnunet_umit.plans.integrity import (
    BadImageError,
    array_problem,
    check_dataset,
    file_problem,
    label_problem,
)

nibabel = pytest.importorskip("nibabel")


def check_image(path: Path) -> None:
    """What the preprocessor does with a damaged file."""
    problem = file_problem(path)
    if problem is not None:
        raise BadImageError(str(problem))


def _write(path: Path, array: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])), path)
    return path


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 20, (20, 18, 16)).astype(np.float32)


@pytest.fixture
def dataset(tmp_path: Path, noise: np.ndarray) -> Path:
    """Two clean cases with two channels."""
    folder = tmp_path / "Dataset901_Integrity"
    label = (noise > 110).astype(np.uint8)
    for case in ("a", "b"):
        for channel in (0, 1):
            _write(folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz", noise + channel)
        _write(folder / "labelsTr" / f"{case}.nii.gz", label)
    content = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "bright": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_whole_file_passes(tmp_path: Path, noise: np.ndarray, ending: str) -> None:
    assert file_problem(_write(tmp_path / f"whole{ending}", noise)) is None


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_truncated_file_is_refused(tmp_path: Path, noise: np.ndarray, ending: str, kept: float) -> None:
    path = _write(tmp_path / f"cut{ending}", noise)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(BadImageError, match="truncated") as caught:
        check_image(path)
    assert str(path) in str(caught.value) and "again from its source" in str(caught.value)


def test_simpleitk_reads_the_truncated_file_as_zeros(tmp_path: Path, noise: np.ndarray) -> None:
    """The reason for the check; should this ever fail, SimpleITK has learned to complain."""
    sitk = pytest.importorskip("SimpleITK")
    path = _write(tmp_path / "cut.nii.gz", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    try:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    except RuntimeError:
        pytest.skip("this SimpleITK refuses truncated files")
    assert (array == 0).any()


def test_header_that_declares_more_than_a_valid_gzip_holds(tmp_path: Path, noise: np.ndarray) -> None:
    path = _write(tmp_path / "short.nii.gz", noise)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-40]))
    with pytest.raises(BadImageError, match=r"20 x 18 x 16 voxels = \d+ bytes, the file holds"):
        check_image(path)


def test_flipped_byte_fails_the_crc(tmp_path: Path, noise: np.ndarray) -> None:
    path = _write(tmp_path / "flipped.nii.gz", noise)
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF  # in the CRC, which ends eight to five bytes before the end
    path.write_bytes(bytes(content))
    with pytest.raises(BadImageError, match="damaged gzip stream"):
        check_image(path)


def test_nifti2_and_big_endian_headers(tmp_path: Path, noise: np.ndarray) -> None:
    second = tmp_path / "second.nii"
    nibabel.save(nibabel.Nifti2Image(noise, np.eye(4)), second)
    big = tmp_path / "big.nii"
    header = nibabel.Nifti1Header(endianness=">")
    nibabel.save(nibabel.Nifti1Image(noise.astype(">f4"), np.eye(4), header), big)
    for path in (second, big):
        assert file_problem(path) is None
        path.write_bytes(path.read_bytes()[:-1])
        assert "truncated" in str(file_problem(path))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_voxels_in_a_file(tmp_path: Path, noise: np.ndarray, value: float, ending: str) -> None:
    """SimpleITK would read them as zeros, so they must be found in the file."""
    for dtype in (np.float32, np.float64):
        image = noise.astype(dtype)
        image[3, 4, 5] = value
        with pytest.raises(BadImageError, match=rf"voxel \(3, 4, 5\) \(x, y, z\) is {value}") as caught:
            check_image(_write(tmp_path / f"bad{ending}", image))
        assert "numpy.nan_to_num" in str(caught.value)


def test_nonfinite_voxel_behind_the_first_chunk(tmp_path: Path) -> None:
    image = np.zeros((90, 80, 70), np.float32)
    image[89, 79, 68] = np.inf
    assert "voxel (89, 79, 68)" in str(file_problem(_write(tmp_path / "large.nii.gz", image)))


def test_empty_missing_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"hello"))
    (tmp_path / "plain.nii.gz").write_bytes(b"not gzip at all")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    expected = {
        "empty.nii.gz": "0 bytes",
        "text.nii.gz": "no NIfTI header",
        "plain.nii.gz": "damaged gzip",
        "image.png": "without the PNG end marker",
        "none.nii.gz": "no such file",
    }
    for name, reason in expected.items():
        assert reason in str(file_problem(tmp_path / name))


def test_error_survives_pickling() -> None:
    """A spawned worker sends it to the main process."""
    error = pickle.loads(pickle.dumps(BadImageError("case.nii.gz: truncated")))
    assert isinstance(error, BadImageError) and str(error) == "case.nii.gz: truncated"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_voxels_are_refused(noise: np.ndarray, value: float) -> None:
    image = np.stack([noise, noise])
    image[1, 3, 4, 5] = value
    problem = array_problem(image, ["first.nii.gz", "second.nii.gz"])
    assert problem is not None and problem.path == "second.nii.gz"
    assert "channel 1" in problem.reason and "(3, 4, 5)" in problem.reason and "1 of 5760 voxels" in problem.reason


def test_constant_image_is_refused_and_one_constant_channel_warned_of(
    noise: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    flat = np.full_like(noise, 7.0)
    problem = array_problem(np.stack([flat, flat]), ["a.nii.gz", "b.nii.gz"])
    assert problem is not None and "a.nii.gz, b.nii.gz" == problem.path and "same value (7, 7)" in problem.reason
    with caplog.at_level(logging.WARNING):
        assert array_problem(np.stack([noise, flat]), ["a.nii.gz", "b.nii.gz"]) is None
    assert "b.nii.gz: channel 1 is constant (7)" in caplog.text


@pytest.mark.parametrize("value", [3, -1, 0.5, np.nan])
def test_undeclared_label_is_refused(value: float) -> None:
    label = np.zeros((1, 4, 4, 4), np.float32)
    label[0, 0, 0, :2] = value
    problem = label_problem(label, [0, 1, 2], "case.nii.gz")
    assert problem is not None and f"{value:g} in 2 voxels" in problem.reason and "[0, 1, 2]" in problem.reason


def test_region_and_ignore_labels_are_declared() -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    assert integrity.allowed_labels({"labels": labels}) == [0, 1, 2, 3, 4]


def test_clean_dataset_has_no_problem(dataset: Path) -> None:
    assert check_dataset(dataset) == []


def test_every_problem_of_a_dataset_is_listed(dataset: Path, noise: np.ndarray) -> None:
    images, labels = dataset / "imagesTr", dataset / "labelsTr"
    cut = images / "a_0000.nii.gz"
    cut.write_bytes(cut.read_bytes()[:900])
    _write(labels / "b.nii.gz", np.full(noise.shape, 5, np.uint8)[:-1])
    shutil.copy(cut, images / "c_0000.nii.gz")
    tests = dataset / "imagesTs"
    tests.mkdir()
    (tests / "d_0000.nii.gz").touch()
    text = "\n".join(map(str, check_dataset(dataset)))
    assert "numTraining is 2, but 3 cases" in text
    assert "a_0000.nii.gz: truncated" in text
    assert "label value 5 in" in text and "differs from image shape" in text
    assert "c.nii.gz: no such file" in text
    assert "d_0000.nii.gz: the file is empty" in text


def test_names_without_the_number_of_a_channel_are_told(dataset: Path) -> None:
    """nnU-Net cuts the ending and five characters off whatever has the ending, and finds no image of that name."""
    shutil.copy(dataset / "imagesTr" / "a_0000.nii.gz", dataset / "imagesTr" / "template.nii.gz")
    (problem,) = check_dataset(dataset)
    assert (
        "1 names without the number of a channel: template.nii.gz" in problem.reason and "_0000.nii.gz" in problem.fix
    )
    for case in ("a", "b"):
        (dataset / "imagesTr" / f"{case}_0001.nii.gz").unlink()
        (dataset / "imagesTr" / f"{case}_0000.nii.gz").rename(dataset / "imagesTr" / f"{case}.nii.gz")
    (problem,) = check_dataset(dataset)
    assert "3 names without the number of a channel: a.nii.gz, b.nii.gz, template.nii.gz" in problem.reason


def test_channels_and_labels_that_do_not_lie_on_their_image(dataset: Path, noise: np.ndarray) -> None:
    _write(dataset / "imagesTr" / "a_0001.nii.gz", noise[:-2], (2.0, 1.0, 1.0))
    turned = nibabel.Nifti1Image((noise > 110).astype(np.uint8), np.diag([-1.0, 1, 1, 1]))
    nibabel.save(turned, dataset / "labelsTr" / "b.nii.gz")
    grids, direction = check_dataset(dataset)
    assert "case a lie on different grids: 16 x 18 x 20 voxels of 1 x 1 x 1 mm, 16 x 18 x 18 voxels" in grids.reason
    assert "Resample all channels" in grids.fix
    assert "label direction 1 0 0 0 -1 0 0 0 1 differs from image direction -1 0 0 0 -1 0 0 0 1" in direction.reason


def test_a_label_has_one_channel_and_an_image_as_many_as_declared(dataset: Path) -> None:
    case = {"images": ["a_0000.png"], "label": "a.png"}
    declared = json.loads((dataset / "dataset.json").read_text())

    class Reader:
        def read_images(self, files: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
            return np.arange(4 * 1 * 8 * 8).reshape(4, 1, 8, 8), {"spacing": [999, 1, 1]}

        def read_seg(self, file: str) -> tuple[np.ndarray, dict[str, Any]]:
            return np.zeros((len(self.label), 1, 8, 8)), {"spacing": [999, 1, 1]}

    reader = Reader()
    reader.label = "r"
    (problem,) = integrity._case_problems("a", case, declared, reader)
    assert problem.reason == "4 channels, dataset.json declares 2 (T1, T2)" and problem.path == "a_0000.png"
    reader.label = "rgb"
    (problem,) = integrity._case_problems("a", case, declared, reader)
    assert "3 channels; a label has one" in problem.reason and problem.path == "a.png"


def test_missing_folder_and_broken_dataset_json(tmp_path: Path) -> None:
    assert "no such dataset folder" in str(check_dataset(tmp_path / "Dataset999_None")[0])
    (tmp_path / "dataset.json").write_text("{")
    assert "not valid JSON" in str(check_dataset(tmp_path)[0])
    (tmp_path / "dataset.json").write_text("{}")
    assert "'labels'" in str(check_dataset(tmp_path)[0])
