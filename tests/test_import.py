"""``umit import``: good files arrive, each bad one is named with its reason, and nothing stops the rest."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from conftest import Folders
from corpus import SHAPE, SPACING, body, make_broken, make_good, names, save, start, umit

from nnunet_umit.importing import judge as judging
from nnunet_umit.importing.discover import discover
from nnunet_umit.importing.verdict import Kind

NAME = "Dataset901_Scans"


# --- the whole ----------------------------------------------------------------------------------------------------


def test_thirty_good_and_twelve_broken_files(nnunet_env: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    good = make_good(folder, 29)
    broken = make_broken(folder / "broken")
    good.append(folder / "broken" / "a duplicate first.nii")  # the one that the duplicate repeats
    (folder / "README.txt").write_text("no image")
    before = {path: path.read_bytes() for path in good}
    assert (len(good), len(broken)) == (30, 12)

    code, output = umit(folder, "--dataset", "901", "--name", "Scans", "--jobs", "0")

    assert code == 1
    assert "30 imported, 12 quarantined" in output
    target = nnunet_env.raw / NAME
    content = json.loads((target / "dataset.json").read_text())
    assert {entry["images"][0] for entry in content["dataset"].values()} == set(map(str, good))
    assert content["numTraining"] == 30 and content["labels"] == {"background": 0, "body": 1}
    assert content["channel_names"] == {"0": "MRI"} and content["file_ending"] == ".nii.gz"
    assert content["overwrite_image_reader_writer"] == "SimpleITKIO"
    with (target / "quarantine.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert {row["path"]: row["kind"] for row in rows} == {path: kind.value for path, kind in broken.items()}
    for row in rows:
        assert row["reason"] and row["fix"] and row["path"] in output and row["reason"] in output
    by_name = {Path(row["path"]).name: row["reason"] for row in rows}
    assert "27000000000000 voxels; the limit is 536870912" in by_name["huge.nii.gz"]
    assert "voxel (5, 4, 3) (x, y, z) is nan" in by_name["nan.nii.gz"]
    assert str(good[-1]) in by_name["b duplicate second.nii.gz"]
    assert "bytes are mha" in by_name["suffix.nii.gz"]
    assert {path.name for path in target.iterdir()} == {"dataset.json", "labelsTr", "quarantine.csv"}
    assert {path.name for path in (target / "labelsTr").iterdir()} == {f"{case}.nii.gz" for case in content["dataset"]}
    assert [path.name for path in nnunet_env.raw.iterdir()] == [NAME]
    assert {path: path.read_bytes() for path in good} == before


def test_stock_readers_find_images_and_masks_on_the_same_grid(tmp_path: Path) -> None:
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    from nnunet_umit.plans.integrity import check_dataset

    make_good(tmp_path / "scans", 6)
    outcome = start(tmp_path / "scans", tmp_path / "raw")
    assert outcome.exit_code == 0
    target = tmp_path / "raw" / NAME
    content = json.loads((target / "dataset.json").read_text())
    reader = determine_reader_writer_from_dataset_json(content, verbose=False)
    cases = get_filenames_of_train_images_and_targets(str(target), content)
    assert len(cases) == 6
    for case in cases.values():
        assert verify_labels(case["label"], reader, [0, 1])
        assert check_cases(case["images"], case["label"], 1, reader)
        shape, spacing, intensities, _, _ = DatasetFingerprintExtractor.analyze_case(
            case["images"], case["label"], reader, num_samples=50
        )
        assert shape[1:] == SHAPE[1:] and spacing == pytest.approx(SPACING[::-1])
        assert np.median(intensities[0]) > 800  # the body, not the air
    assert check_dataset(target) == []


@pytest.mark.end_to_end
def test_stock_planning_and_preprocessing(nnunet_env: Folders, tmp_path: Path) -> None:
    for index in range(5):
        save(tmp_path / "scans" / f"s{index}" / "T1.nrrd", body(index, (24, 40, 36)))
    assert umit(tmp_path / "scans", "-d", "901", "-n", "Scans", "-j", "1")[0] == 0
    script = Path(sysconfig.get_path("scripts")) / "nnUNetv2_plan_and_preprocess"
    command = [sys.executable, str(script), "-d", "901", "-pl", "UMITPlanner", "--verify_dataset_integrity"]
    command += ["-c", "3d_fullres", "-np", "1", "-npfp", "1"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    out = nnunet_env.preprocessed / NAME
    plans = json.loads((out / "UMITPlans.json").read_text())
    folder = out / plans["configurations"]["3d_fullres"]["data_identifier"]
    assert len(list(folder.glob("*.pkl"))) == 5
    assert len(list((out / "gt_segmentations").glob("*.nii.gz"))) == 5


def test_nothing_broken_and_nothing_usable(nnunet_env: Folders, tmp_path: Path) -> None:
    make_good(tmp_path / "good", 2)
    code, output = umit(tmp_path / "good", "-d", "901", "-n", "Scans", "-j", "0", "--modality", "CT")
    assert code == 0 and "2 imported, 0 quarantined" in output
    content = json.loads((nnunet_env.raw / NAME / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "CT"}
    assert "nnUNetv2_plan_and_preprocess -d 901 -pl UMITPlanner\n" in output

    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.nii.gz").touch()
    code, output = umit(tmp_path / "bad", "-d", "902", "-n", "Bad", "-j", "0")
    assert code == 2 and "0 imported, 1 quarantined" in output and "Nothing usable" in output
    assert not (nnunet_env.raw / "Dataset902_Bad").exists()
    quarantine = nnunet_env.raw / ".umit-import-Dataset902_Bad" / "quarantine.csv"
    assert str(quarantine) in output and "a.nii.gz" in quarantine.read_text()


def test_photographs_of_other_kinds_are_named(tmp_path: Path) -> None:
    make_good(tmp_path / "scans", 2)
    (tmp_path / "scans" / "photo.JPG").write_bytes(b"\xff\xd8\xff\xe0" + bytes(40))
    (tmp_path / "scans" / "notes.bmp").write_bytes(b"no picture")
    outcome = start(tmp_path / "scans", tmp_path / "raw")
    (entry,) = outcome.rejections
    assert outcome.exit_code == 1 and entry.kind is Kind.FORMAT and entry.path.endswith("photo.JPG")
    assert "a JPEG picture" in entry.reason and "Convert it to PNG" in entry.fix and "--exclude '*.JPG'" in entry.fix
    assert outcome.ignored[".bmp"] == 1


def test_what_could_not_be_opened_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """chmod changes neither size nor time of a file."""
    make_good(tmp_path / "scans", 2)

    def closed(candidate: object, kind: str, max_voxels: int) -> None:
        raise PermissionError(13, "Permission denied")

    load = judging.load_volume
    monkeypatch.setattr(judging, "load_volume", closed)
    assert start(tmp_path / "scans", tmp_path / "raw").exit_code == 2
    monkeypatch.setattr(judging, "load_volume", load)
    assert start(tmp_path / "scans", tmp_path / "raw").exit_code == 0


def test_images_that_look_like_ct_are_pointed_out(nnunet_env: Folders, tmp_path: Path) -> None:
    save(tmp_path / "scans" / "ct.nii.gz", body(0) - 1100)
    assert "--modality CT" in umit(tmp_path / "scans", "-d", "901", "-n", "Scans", "-j", "0")[1]
    assert "if it is CT" not in umit(tmp_path / "scans", "-d", "902", "-n", "CT", "-j", "0", "--modality", "CT")[1]


def test_help_needs_no_heavy_library() -> None:
    code = """
import sys
from nnunet_umit.cli.app import app
try:
    app(["import", "--help"], prog_name="umit")
finally:
    print("LOADED", [name for name in ("torch", "nnunetv2", "numpy", "SimpleITK", "skimage") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []" and "--max-voxels" in done.stdout


# --- what is found ------------------------------------------------------------------------------------------------


def test_a_reader_that_raises_anything_becomes_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_good(tmp_path / "scans", 3)

    def raising(candidate: object, kind: str, max_voxels: int) -> None:
        raise {"nifti.gz": ZeroDivisionError("odd"), "nifti": MemoryError(), "mha": PermissionError(13, "denied")}[kind]

    monkeypatch.setattr(judging, "load_volume", raising)
    outcome = start(tmp_path / "scans", tmp_path / "raw")
    reasons = sorted(entry.reason for entry in outcome.rejections)
    assert reasons == [
        "cannot be opened (denied)",
        "does not fit into memory",
        "the reader failed (ZeroDivisionError: odd)",
    ]


def test_links_are_followed_once_and_what_is_no_image_is_counted(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "scans", tmp_path / "elsewhere"
    make_good(folder, 2)
    save(elsewhere / "linked.nii.gz", body(50))
    (folder / "a link").symlink_to(elsewhere, target_is_directory=True)
    (folder / "again").symlink_to(elsewhere, target_is_directory=True)
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "gone.nii.gz").symlink_to(tmp_path / "annex" / "gone.nii.gz")
    (folder / "gone.txt").symlink_to(tmp_path / "gone.txt")
    (folder / "itself").symlink_to("itself")
    (folder / ".hidden.nii.gz").touch()
    (folder / "notes.csv").write_text("a,b")
    (folder / "archive.tar.gz").write_bytes(b"\x1f\x8b" + b"junk" * 10)
    os.mkfifo(folder / "pipe.nii.gz")
    closed = folder / "closed"
    closed.mkdir()
    closed.chmod(0)
    (folder / "pair.hdr").write_bytes(bytes(344) + b"ni1\0")
    (folder / "scan.dat").write_bytes((elsewhere / "linked.nii.gz").read_bytes())
    save(folder / "left_seg.nii.gz", body(51))
    save(folder / "Dataset007_Old" / "labelsTr" / "x.nii.gz", body(52))
    (folder / "Dataset007_Old" / "dataset.json").write_text("{}")
    save(folder / "labelsTr" / "kept.nii.gz", body(53))  # only a name, beside no dataset.json
    found = discover(folder, exclude=["*_seg.nii.gz"])
    closed.chmod(0o700)
    assert [candidate.relative for candidate in found.candidates] == [
        "a link/linked.nii.gz",
        "good 00.nii",
        "labelsTr/kept.nii.gz",
        "patient.00/T1.nii.gz",
    ]
    assert {os.path.relpath(entry.path, folder): entry.kind for entry in found.rejections} == {
        "again": Kind.FOLDER,
        "up": Kind.FOLDER,
        "gone.nii.gz": Kind.UNREADABLE,
        "itself": Kind.UNREADABLE,
        "closed": Kind.UNREADABLE,
        "pair.hdr": Kind.FORMAT,
        "scan.dat": Kind.SUFFIX,
    }
    assert next(entry.fix for entry in found.rejections if entry.kind is Kind.SUFFIX) == "Rename it to end with .nii.gz"
    assert found.ignored == {
        "hidden": 1,
        ".csv": 1,
        ".txt": 1,
        ".gz": 1,
        ".json": 1,
        "excluded": 1,
        "folders of labels": 1,
        "devices, pipes and sockets": 1,
    }


def test_raw_folder_inside_the_imported_one_is_not_imported_again(tmp_path: Path) -> None:
    make_good(tmp_path, 3)
    first = start(tmp_path, tmp_path / "raw")
    second = start(tmp_path, tmp_path / "raw", overwrite=True)
    assert names(first) == names(second) and second.exit_code == 0


def test_file_names_of_any_bytes(nnunet_env: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    good = save(folder / "plain.nii.gz", body(0))
    strange = os.path.join(os.fsencode(folder), b"caf\xe9 [bold].nii.gz")
    try:
        Path(os.fsdecode(strange)).write_bytes(b"junk")
    except OSError:
        pytest.skip("this file system wants UTF-8 names")
    variable = folder / "$HOME.nii.gz"
    variable.write_bytes(good.read_bytes())
    code, output = umit(folder, "-d", "901", "-n", "Scans", "-j", "0")
    assert code == 1 and "1 imported, 2 quarantined" in output and "[bold].nii.gz" in output
    content = (nnunet_env.raw / NAME / "quarantine.csv").read_bytes()
    assert b"caf\xe9" in content and b"$HOME.nii.gz" in content
    assert "nnU-Net would replace the variable" in output
