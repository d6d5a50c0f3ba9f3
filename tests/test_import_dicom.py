"""What ``umit import`` says of DICOM: series found, joined, put in order, converted, and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from corpus import body, make_series, start

from nnunet_umit.importing import dicom
from nnunet_umit.importing.dicom import Slice
from nnunet_umit.importing.loading import check_slices
from nnunet_umit.importing.verdict import Kind, RejectedError


def test_dicom_series_are_converted_one_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    volumes = {uid: make_series(folder / "a", uid) for uid in ("1.2.8.1", "1.2.8.2")}
    make_series(folder / "gap", "1.2.8.3", missing=(4,))
    make_series(folder / "scout", "1.2.8.4", slices=1)
    damaged = folder / "a" / "damaged.dcm"
    damaged.write_bytes(next((folder / "gap").iterdir()).read_bytes()[:700])
    (folder / "a" / "empty.dcm").touch()
    (folder / "a" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    for file in sorted((folder / "a").glob("*1.2.8.2_*")):
        file.rename(file.with_suffix(""))  # as many archives name them; the type is in the bytes

    outcome = start(folder, tmp_path / "raw")

    rejected = {entry.path: entry.kind for entry in outcome.rejections}
    assert rejected == {
        str(folder / "a" / "empty.dcm"): Kind.EMPTY,
        str(damaged): Kind.HEADER,
        str(folder / "gap" / "0_1.2.8.3_0.dcm"): Kind.GEOMETRY,
        str(folder / "scout" / "0_1.2.8.4_0.dcm"): Kind.DIMENSION,
    }
    gap = next(entry for entry in outcome.rejections if "gap" in entry.path)
    assert "2.5 to 5 mm apart, usually 2.5" in gap.reason
    assert gap.reason.endswith("(DICOM series 1.2.8.3, files: 9)"), "which of the series in its folder"
    assert {case.relative for case in outcome.cases} == {"a/1.2.8.1", "a/1.2.8.2"}
    for case in outcome.cases:
        target = tmp_path / "raw" / "Dataset901_Scans"
        assert case.image == f"imagesTr/{case.name}_0000.nii.gz" and case.name.startswith("a_")
        image = sitk.ReadImage(str(target / case.image))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volumes[case.relative[2:]])
        assert image.GetSpacing() == pytest.approx((0.7, 0.7, 2.5))
        assert sitk.ReadImage(str(target / case.label)).GetSize() == (20, 16, 10)
    assert len(list((target / "imagesTr").iterdir())) == 2


def test_a_dicom_folder_may_be_named_by_way_of_another(tmp_path: Path) -> None:
    make_series(tmp_path / "study" / "a", "1.2.8.1")
    (tmp_path / "work").mkdir()
    outcome = start(tmp_path / "work" / ".." / "study", tmp_path / "raw")
    assert [case.relative for case in outcome.cases] == ["a/1.2.8.1"] and not outcome.rejections


@pytest.mark.parametrize("folders", [2, 10])
def test_a_series_may_lie_in_several_folders(tmp_path: Path, folders: int) -> None:
    """Half and half, or every slice in a folder of its own."""
    study = tmp_path / "study"
    volume = make_series(study / "0", "1.2.8.1")
    for index, file in enumerate(sorted((study / "0").iterdir())):
        if index % folders:
            (study / str(index % folders)).mkdir(exist_ok=True)
            file.rename(study / str(index % folders) / file.name)
    outcome = start(study, tmp_path / "raw")
    assert not outcome.rejections
    (case,) = outcome.cases
    assert case.relative == "0/1.2.8.1" and case.shape == (10, 16, 20)
    image = sitk.ReadImage(str(tmp_path / "raw" / "Dataset901_Scans" / case.image))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volume)


def test_series_that_an_anonymiser_gave_one_uid_stay_apart(tmp_path: Path) -> None:
    make_series(tmp_path / "study" / "a", "1.2.8.1")
    make_series(tmp_path / "study" / "b", "1.2.8.2")  # other voxels in the same place
    for file in (tmp_path / "study" / "b").iterdir():
        file.write_bytes(file.read_bytes().replace(b"1.2.8.2", b"1.2.8.1"))
    outcome = start(tmp_path / "study", tmp_path / "raw")
    assert [case.relative for case in outcome.cases] == ["a/1.2.8.1", "b/1.2.8.1"] and not outcome.rejections


def test_every_header_is_read_once_however_many_series_a_folder_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 6):
        make_series(tmp_path / "study", f"1.2.8.{number}", slices=4)
    read, seen = dicom.read_slice, list[str]()
    monkeypatch.setattr(dicom, "read_slice", lambda path: seen.append(path) or read(path))
    files = tuple((file.name, "state") for file in (tmp_path / "study").iterdir())
    found = dicom.survey(dicom.Folder(str(tmp_path / "study"), "study", files))
    assert len(seen) == len(files) == 20 and not found.rejections
    assert {each.uid: each.files for each in found.series} == {
        f"1.2.8.{number}": tuple(f"{(7 * index) % 10}_1.2.8.{number}_{index}.dcm" for index in range(4))
        for number in range(1, 6)
    }


def test_slices_without_places_come_in_the_order_of_their_numbers() -> None:
    ways = (1.0, 0, 0, 0, 1, 0)
    numbered = {"a": Slice("1", 3, None, None), "b": Slice("1", 1, ways, (0, 0, 9.0)), "c": Slice("1", 2, None, None)}
    assert dicom.in_order(numbered) == ("b", "c", "a")
    placed = {name: Slice("1", 1, ways, (0, 0, place)) for name, place in (("a", 2.0), ("b", -3.5), ("c", 0.0))}
    assert dicom.in_order(placed) == ("b", "c", "a")
    assert dicom.numbers("1\\-2.5\\3\0", 3) == (1.0, -2.5, 3.0)
    assert dicom.numbers("1\\2", 3) is None and dicom.numbers("1\\x\\3", 3) is None and dicom.numbers("", 1) is None


def test_frames_are_not_taken_for_slices(tmp_path: Path) -> None:
    """A cine loop in one file: nothing tells its moments from slices."""
    image = sitk.GetImageFromArray(body(3, (12, 16, 20)))
    for tag, value in {"0008|0060": "US", "0008|0008": "DERIVED\\SECONDARY", "0020|000e": "1.2.8.7"}.items():
        image.SetMetaData(tag, value)
    (tmp_path / "study").mkdir()
    sitk.WriteImage(image, str(tmp_path / "study" / "cine.dcm"))
    (entry,) = start(tmp_path / "study", tmp_path / "raw").rejections
    assert entry.kind is Kind.DIMENSION and "multi-frame DICOM of 12 frames" in entry.reason


def test_slices_must_be_evenly_spaced() -> None:
    straight, sagittal = np.array([[1.0, 0, 0, 0, 1, 0]]), np.array([[0, 1.0, 0, 0, 0, 1]])
    stack = np.array([[0, 0, 3.0 * index] for index in range(6)])
    check_slices(stack, straight.repeat(6, 0))
    check_slices(stack[::-1], straight.repeat(6, 0))
    check_slices(stack[:, [2, 0, 1]], sagittal.repeat(6, 0))
    with pytest.raises(RejectedError, match="its 6 slices look in 2 directions") as caught:
        check_slices(stack, np.concatenate((straight.repeat(3, 0), sagittal.repeat(3, 0))))
    assert caught.value.kind is Kind.DIMENSION
    cases = [
        (np.delete(stack, 2, axis=0), Kind.GEOMETRY, "3 to 6 mm apart"),
        (stack[[0, 2, 1, 3, 4, 5]], Kind.GEOMETRY, "its 6 slices are not in the order of their places"),
        (np.concatenate([stack, stack]), Kind.DIMENSION, "12 slices at 6 positions"),
        (stack + np.arange(6)[:, None] * [0, 0.5, 0], Kind.GEOMETRY, "leans by 2.5 mm over 15.0 mm"),
    ]
    for positions, kind, words in cases:
        with pytest.raises(RejectedError, match=words) as caught:
            check_slices(positions, straight.repeat(len(positions), 0))
        assert caught.value.kind is kind
