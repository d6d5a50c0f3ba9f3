"""``umit import`` a second time: names that stay, imports that were stopped, places that are taken, full disks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Folders
from corpus import body, kinds, make_good, names, save, start, umit

from nnunet_umit.importing import judge as judging
from nnunet_umit.importing import run
from nnunet_umit.importing.dataset import RequestError, folder_name
from nnunet_umit.importing.discover import case_name
from nnunet_umit.importing.run import Request, import_folder
from nnunet_umit.importing.verdict import Kind, OutputError

NAME = "Dataset901_Scans"


def test_three_hundred_small_files_keep_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    volume = body(0)
    for index in range(300):
        volume[0, 0, :2] = divmod(index, 20)
        path = folder / f"{index % 20}" / f"scan {index // 20}.nii.gz"  # each file name twenty times
        save(path, volume, compress=True)
    first = start(folder, tmp_path / "raw", jobs=1)
    assert first.exit_code == 0 and len(set(names(first).values())) == 300
    save(folder / "0" / "another.nii.gz", body(1))
    (folder / "1" / "scan 0.nii.gz").unlink()
    second = start(folder, tmp_path / "raw", overwrite=True)
    kept = names(second)
    assert kept.pop("0/another.nii.gz") == case_name("0/another.nii.gz", ".nii.gz")
    assert {**kept, "1/scan 0.nii.gz": names(first)["1/scan 0.nii.gz"]} == names(first)
    labels = tmp_path / "raw" / NAME / "labelsTr"
    assert {path.name for path in labels.iterdir()} == {f"{name}.nii.gz" for name in names(second).values()}


def test_case_names() -> None:
    assert case_name("a/b.nii", ".nii") != case_name("a_b.nii", ".nii")
    assert case_name("x.nii", ".nii") != case_name("x.nii.gz", ".nii.gz")
    assert case_name("a", extra="1") != case_name("a", extra="2")
    assert case_name("sub-01/T1 w.nii.gz", ".nii.gz").startswith("sub-01_T1_w_")
    assert case_name("ü.nii", ".nii").startswith("case_")
    assert len(case_name("d/" * 300 + "x.nii", ".nii")) <= 91


def test_interrupted_import_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, raw = tmp_path / "scans", tmp_path / "raw"
    make_good(folder, 8)
    (folder / "bad.nii.gz").write_bytes(b"not an image")
    raw.mkdir()
    staging = raw / f".umit-import-{NAME}"

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    request = Request(folder=folder, raw=raw, name=NAME, jobs=0)
    with pytest.raises(KeyboardInterrupt):
        import_folder(request, stop)
    assert not (raw / NAME).exists() and (staging / "journal.jsonl").is_file()
    with (staging / "journal.jsonl").open("a") as handle:
        handle.write('{"relative": "cut of')  # a kill in the middle of a line
    changed = folder / "bad.nii.gz"
    os.utime(changed, ns=(1, 1))  # judged before, but another file now
    judged = []
    monkeypatch.setattr(
        run, "judge", lambda candidate, **rest: judged.append(candidate) or judging.judge(candidate, **rest)
    )
    outcome = import_folder(request, lambda done, total: None)
    assert outcome.resumed == 4 and len(judged) == 5
    assert kinds(outcome) == {str(changed): Kind.HEADER}
    assert len(outcome.cases) == 8 and not staging.exists()
    assert not (raw / NAME / "journal.jsonl").exists()

    with pytest.raises(KeyboardInterrupt):
        import_folder(Request(folder=folder, raw=raw, name="Dataset902_X", jobs=0), stop)
    other = Request(folder=folder, raw=raw, name="Dataset902_X", jobs=0, max_voxels=10)
    assert import_folder(other, lambda done, total: None).resumed == 0  # under another limit nothing stands


def test_ctrl_c_says_what_to_do(nnunet_env: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    make_good(tmp_path / "scans", 1)
    monkeypatch.setattr(run, "judge", interrupt)
    code, output = umit(tmp_path / "scans", "-d", "901", "-n", "Scans", "-j", "0")
    assert code == 130 and "no dataset was written. The same command goes on" in output
    assert not (nnunet_env.raw / NAME).exists()


def test_a_place_that_is_taken_is_refused(nnunet_env: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    make_good(folder, 2)
    foreign = nnunet_env.raw / NAME
    foreign.mkdir()
    (foreign / "dataset.json").write_text("{}")
    arguments = (folder, "-d", "901", "-n", "Scans", "-j", "0")
    code, output = umit(*arguments)
    assert code == 2 and "exists" in output and "--overwrite" in output
    code, output = umit(*arguments, "--overwrite")
    assert code == 2 and "was not written by umit import" in output
    assert [path.name for path in foreign.iterdir()] == ["dataset.json"]
    code, output = umit(folder, "-d", "901", "-n", "Other", "-j", "0")
    assert code == 2 and "number 901 belongs to" in output
    shutil.rmtree(foreign)
    assert umit(*arguments)[0] == 0
    assert umit(*arguments)[0] == 2
    (folder / "good 00.nii").unlink()
    code, output = umit(*arguments, "--overwrite")
    assert code == 0 and "1 imported" in output
    assert [path.name for path in nnunet_env.raw.iterdir()] == [NAME]


def test_a_linked_dataset_is_replaced_and_what_the_link_led_to_stays(tmp_path: Path) -> None:
    make_good(tmp_path / "scans", 3)
    first = start(tmp_path / "scans", tmp_path / "raw")
    target, disk = tmp_path / "raw" / NAME, tmp_path / "disk"
    disk.mkdir()
    for attempt in range(2):
        shutil.move(target, disk / str(attempt))
        target.symlink_to(disk / str(attempt))
        again = start(tmp_path / "scans", tmp_path / "raw", overwrite=True)
        assert again.exit_code == 0 and names(again) == names(first)
        assert not target.is_symlink() and (disk / str(attempt) / "dataset.json").is_file()
        assert [path.name for path in target.parent.iterdir()] == [NAME]


def test_verdicts_go_when_the_dataset_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before that must not cost them."""
    make_good(tmp_path / "scans", 3)
    rename = os.rename

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "scans", tmp_path / "raw")
    monkeypatch.setattr(os, "rename", rename)
    again = start(tmp_path / "scans", tmp_path / "raw")
    assert again.resumed == 3 and not (tmp_path / "raw" / NAME / "journal.jsonl").exists()


@pytest.mark.parametrize(("number", "name"), [(0, "x"), (1000, "x"), (5, ""), (5, "a b"), (5, "../x"), (5, "_x")])
def test_names_that_nnunet_would_not_find(number: int, name: str) -> None:
    with pytest.raises(RequestError):
        folder_name(number, name)


def test_wrong_requests(nnunet_env: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert umit(tmp_path / "none", "-d", "901")[0] == 2
    assert umit(tmp_path)[0] == 2
    assert umit(tmp_path, "-d", "901", "--raw", tmp_path / "none")[0] == 2
    monkeypatch.delenv("nnUNet_raw")
    code, output = umit(tmp_path, "-d", "901")
    assert code == 2 and "nnUNet_raw is not set" in output
    assert "1 some in quarantine, 2 nothing usable" in " ".join(umit("--help")[1].replace("│", " ").split())


def test_a_full_disk_ends_the_run_and_blames_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("No space left on device")

    make_good(tmp_path / "scans", 3)
    monkeypatch.setattr(judging, "_write_mask", full)
    with pytest.raises(OutputError, match="No space left"):
        start(tmp_path / "scans", tmp_path / "raw")
    assert not (tmp_path / "raw" / NAME).exists()
    monkeypatch.undo()
    outcome = start(tmp_path / "scans", tmp_path / "raw")
    assert (len(outcome.cases), outcome.rejections) == (3, [])


def test_a_disk_that_fills_up_without_a_word_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ITK does not look whether the last bytes of a compressed file were written."""
    write = judging._write_mask

    def cut(mask: Any, loaded: Any, path: str) -> None:
        write(mask, loaded, path)
        Path(path).write_bytes(Path(path).read_bytes()[:-20])

    make_good(tmp_path / "scans", 3)
    monkeypatch.setattr(judging, "_write_mask", cut)
    with pytest.raises(OutputError, match="truncated: the gzip stream ends early, .*; is the disk full"):
        start(tmp_path / "scans", tmp_path / "raw")
    monkeypatch.undo()
    assert len(start(tmp_path / "scans", tmp_path / "raw").cases) == 3
