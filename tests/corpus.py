"""Folders of images as people have them: good ones of every kind, and one of each way to be broken."""

from __future__ import annotations

import fcntl
import gzip
import os
import signal
import struct
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from typer.testing import CliRunner

from nnunet_umit.cli.app import app
from nnunet_umit.importing.judge import judge
from nnunet_umit.importing.run import Outcome, Request, import_folder
from nnunet_umit.importing.verdict import Candidate, Kind, Verdict

SHAPE = (10, 14, 12)  # z, y, x
SPACING = (0.8, 0.9, 2.5)  # x, y, z
HEADER = 352  # bytes before the voxels of a NIfTI-1 file


def body(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A noisy bright ellipsoid in noise, int16: a body in air."""
    rng = np.random.default_rng(seed)
    grids = np.meshgrid(*[np.linspace(-1, 1, size) if size > 1 else [0.0] for size in shape], indexing="ij")
    inside = sum(grid**2 for grid in grids) < 0.6
    return (np.where(inside, 800, 0) + rng.normal(50, 10, shape)).astype(np.int16)


def save(path: Path, array: np.ndarray, spacing: tuple[float, ...] = SPACING, compress: bool = True) -> Path:
    """Write an array (z, y, x) with SimpleITK."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([*spacing, 1.0][: array.ndim])
    sitk.WriteImage(image, str(path), compress)
    return path


def make_good(folder: Path, number: int = 30) -> list[Path]:
    """Volumes in all formats and several types, half of them in sub-folders that repeat the file names."""
    endings = [(".nii.gz", True), (".nii", False), (".mha", True), (".mha", False), (".nrrd", True), (".nrrd", False)]
    types = [np.int16, np.float32, np.uint16, np.float64, np.int32]
    paths = []
    for index in range(number):
        ending, compress = endings[index % len(endings)]
        array = body(index, (SHAPE[0] + index % 3, *SHAPE[1:])).astype(types[index % len(types)])
        name = f"good {index // 2:02d}" if index % 2 else f"patient.{index // 2:02d}/T1"
        paths.append(save(folder / f"{name}{ending}", array, compress=compress))
    return paths


def edit(source: Path, target: Path, *changes: tuple[str, int, tuple[float, ...]]) -> Path:
    """Copy an uncompressed NIfTI file with other header fields: (struct format, byte, values)."""
    content = bytearray(source.read_bytes())
    for layout, place, values in changes:
        struct.pack_into(layout, content, place, *values)
    target.write_bytes(gzip.compress(bytes(content)) if target.name.endswith(".gz") else bytes(content))
    return target


def make_broken(folder: Path) -> dict[str, Kind]:
    """Twelve ways to be broken; path -> what should be said of it."""
    broken: dict[str, Kind] = {}

    def expect(path: Path, kind: Kind) -> Path:
        broken[str(path)] = kind
        return path

    folder.mkdir(parents=True, exist_ok=True)
    plain = save(folder / "a duplicate first.nii", body(900), compress=False)
    whole = save(folder / "truncated.nii.gz", body(901))
    expect(whole, Kind.COMPRESSION).write_bytes(whole.read_bytes()[:-200])
    expect(edit(plain, folder / "header.nii", ("<8h", 40, (3, -12, 14, 10, 1, 1, 1, 1))), Kind.HEADER)
    array = body(902).astype(np.float32)
    array[3, 4, 5] = np.nan
    expect(save(folder / "nan.nii.gz", array), Kind.NON_FINITE)
    expect(folder / "zero.nii.gz", Kind.EMPTY).touch()
    expect(folder / "suffix.nii.gz", Kind.SUFFIX).write_bytes(save(folder / "x.mha", body(903)).read_bytes())
    (folder / "x.mha").unlink()
    expect(folder / "b duplicate second.nii.gz", Kind.DUPLICATE).write_bytes(gzip.compress(plain.read_bytes()))
    expect(save(folder / "flat.mha", body(904, (14, 12))), Kind.DIMENSION)
    series = np.stack([body(905), body(906)])
    expect(save(folder / "series.nii.gz", series, (*SPACING, 1.0)), Kind.DIMENSION)
    (folder / "sub").mkdir()
    expect(folder / "sub" / "loop", Kind.FOLDER).symlink_to(folder, target_is_directory=True)
    expect(save(folder / "secret.nii.gz", body(907)), Kind.UNREADABLE).chmod(0)
    expect(save(folder / "constant.nrrd", np.full(SHAPE, 7, np.int16)), Kind.CONSTANT)
    huge = ("<8h", 40, (3, 30000, 30000, 30000, 1, 1, 1, 1))
    expect(edit(plain, folder / "huge.nii.gz", huge), Kind.TOO_LARGE)
    plain.rename(folder / "a duplicate first.nii")
    return broken


def make_series(folder: Path, uid: str, slices: int = 10, missing: tuple[int, ...] = ()) -> np.ndarray:
    """A DICOM series, one file a slice, named so that alphabetical order is not slice order; returns its voxels."""
    folder.mkdir(parents=True, exist_ok=True)
    volume = body(int(uid.rpartition(".")[2]), (slices, 16, 20))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    tags = {"0008|0060": "MR", "0008|0008": "DERIVED\\SECONDARY", "0020|000d": "1.2.3", "0020|000e": uid}
    for index, plane in enumerate(volume):
        if index in missing:
            continue
        image = sitk.GetImageFromArray(plane)
        image.SetSpacing((0.7, 0.7))
        place = {"0020|0032": f"0\\0\\{2.5 * index}", "0020|0037": "1\\0\\0\\0\\1\\0", "0018|0050": "2.5"}
        for tag, value in {**tags, **place, "0008|0018": f"{uid}.{index}", "0020|0013": str(index)}.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{(7 * index) % 10}_{uid}_{index}.dcm"))
        writer.Execute(image)
    return volume


def start(folder: Path, raw: Path, **options: Any) -> Outcome:
    """Import into ``Dataset901_Scans``, within this process unless ``jobs`` says otherwise."""
    raw.mkdir(exist_ok=True)
    options = {"name": "Dataset901_Scans", "jobs": 0, **options}
    return import_folder(Request(folder=folder, raw=raw, **options), lambda done, total: None)


def umit(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, ["import", *map(str, arguments)])
    return result.exit_code, result.output


def kinds(outcome: Outcome) -> dict[str, Kind]:
    return {entry.path: entry.kind for entry in outcome.rejections}


def names(outcome: Outcome) -> dict[str, str]:
    return {case.relative: case.name for case in outcome.cases}


def judge_or_die(candidate: Candidate, destination: str, max_voxels: int) -> Verdict:
    """`judge`, except that a file called "killer" takes the process with it, as the system does without memory."""
    if "killer" in candidate.relative:
        os.kill(os.getpid(), signal.SIGKILL)
    return judge(candidate, destination, max_voxels)


def die() -> None:
    """Preparation of a worker process that does not survive it."""
    os.kill(os.getpid(), signal.SIGKILL)


def hold_for_ever(paths: tuple[str, str]) -> None:
    """Lock the first path, say so into the second, and wait for nothing."""
    with open(paths[0], "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        Path(paths[1]).write_text("held")
        signal.pause()


def identity(item: int) -> int:
    return item


def do_nothing() -> None:
    """Preparation of a worker process that needs none."""
