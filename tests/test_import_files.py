"""What ``umit import`` says of single files: volumes and pictures."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from corpus import HEADER, SHAPE, SPACING, body, edit, save, start
from skimage import io

from nnunet_umit.importing.discover import discover
from nnunet_umit.importing.formats import sniff
from nnunet_umit.importing.headers import declared
from nnunet_umit.importing.judge import judge
from nnunet_umit.importing.run import MAX_VOXELS
from nnunet_umit.importing.stream import scan, tally_array
from nnunet_umit.importing.verdict import Case, Kind, RejectedError, Rejection, Verdict

BYTES = int(np.prod(SHAPE)) * 2  # of an int16 volume


def say(path: Path, max_voxels: int = MAX_VOXELS) -> Rejection | Case:
    """Judge one file; the mask goes into a folder beside it."""
    out = path.parent / ".out"
    (out / "labelsTr").mkdir(parents=True, exist_ok=True)
    candidate = next(one for one in discover(path.parent).candidates if one.path == str(path))
    verdict = judge(candidate, str(out), max_voxels)
    assert Verdict.from_dict(verdict.to_dict()) == verdict
    answer = verdict.rejection or verdict.case
    assert answer is not None
    return answer


def reject(path: Path, **options: Any) -> tuple[Kind, str]:
    answer = say(path, **options)
    assert isinstance(answer, Rejection), f"{path} was accepted"
    assert answer.fix and answer.path == str(path)
    return answer.kind, answer.reason


def accept(path: Path) -> Case:
    answer = say(path)
    assert isinstance(answer, Case), answer
    return answer


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save(tmp_path / "plain.nii", body(0), compress=False)


# --- volumes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("dtype", ["int16", "float32", "uint8", "float64"])
def test_case_of_a_good_volume(tmp_path: Path, ending: str, dtype: str) -> None:
    array = np.clip(body(1), 0, 255).astype(dtype)
    case = accept(save(tmp_path / f"x{ending}", array))
    assert case.shape == SHAPE and case.spacing == pytest.approx(SPACING[::-1])
    assert (case.low, case.high) == (array.min(), array.max())
    assert (case.dimension, case.channels, case.reader) == (3, 1, "SimpleITKIO")
    assert case.digest == tally_array(array, SHAPE[::-1]).digest
    image, label = (sitk.ReadImage(str(path)) for path in (case.image, tmp_path / ".out" / case.label))
    assert label.GetPixelID() == sitk.sitkUInt8
    for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(label, geometry)() == pytest.approx(getattr(image, geometry)(), abs=1e-6)


@pytest.mark.parametrize(("ending", "compress"), [(".nii", False), (".mha", False), (".nrrd", False)])
def test_bytes_against_header_without_compression(tmp_path: Path, ending: str, compress: bool) -> None:
    path = save(tmp_path / f"x{ending}", body(1), compress=compress)
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    kind, reason = reject(path)
    assert kind is Kind.BYTES and f"= {BYTES} bytes, the file holds {BYTES - 300}" in reason
    path.write_bytes(whole + bytes(5000))
    kind, reason = reject(path)
    assert kind is Kind.BYTES and "at least 5000 bytes more" in reason
    path.write_bytes(whole + bytes(100))  # padding
    assert accept(path).voxels == np.prod(SHAPE)


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
def test_damaged_compression(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"x{ending}", body(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    kind, reason = reject(path)
    assert kind is Kind.COMPRESSION and "ends early" in reason
    path.write_bytes(whole[:-500] + bytes([whole[-500] ^ 255]) + whole[-499:])
    assert reject(path)[0] in (Kind.COMPRESSION, Kind.BYTES)


def test_gzip_checksum_is_verified(plain: Path) -> None:
    packed = bytearray(gzip.compress(plain.read_bytes()))
    packed[-8] ^= 1  # CRC
    target = plain.with_name("crc.nii.gz")
    target.write_bytes(packed)
    kind, reason = reject(target)
    assert kind is Kind.COMPRESSION and "CRC" in reason


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (("<8h", 40, (3, -1, 14, 10, 1, 1, 1, 1)), Kind.HEADER, "no NIfTI header"),
        (("<8h", 40, (3, 12, 14, 11, 1, 1, 1, 1)), Kind.BYTES, "holds 3360"),
        (("<8h", 40, (3, 12, 14, 5, 1, 1, 1, 1)), Kind.BYTES, "bytes more"),
        (("<8h", 40, (5, 12, 14, 5, 1, 2, 1, 1)), Kind.DIMENSION, "5D (12 x 14 x 5 x 1 x 2)"),
        (("<h", 70, (128,)), Kind.FORMAT, "voxel type 128"),
        (("<h", 72, (32,)), Kind.HEADER, "int16 with 32 bits"),
        (("<f", 108, (1e9,)), Kind.HEADER, "voxels begin at byte 1000000000"),
        (("<f", 108, (0,)), Kind.HEADER, "voxels begin at byte 0"),
        (("<f", 80, (0.0,)), Kind.GEOMETRY, "spacing 0, 0.9, 2.5 mm"),
        (("<f", 84, (float("nan"),)), Kind.GEOMETRY, "spacing 0.8, nan, 2.5 mm"),
        (("<f", 88, (5e3,)), Kind.GEOMETRY, "between 0.0001 and 1000"),
        (("<2f", 112, (float("inf"), 0.0)), Kind.HEADER, "voxel scale inf"),
        (("<2f", 112, (1e-30, 5e20)), Kind.CONSTANT, "once read"),
        (("<4s", 344, (b"ni1\0",)), Kind.FORMAT, "NIfTI pair"),
    ],
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_wrong_nifti_headers(
    plain: Path, ending: str, change: tuple[str, int, tuple[Any, ...]], kind: Kind, words: str
) -> None:
    found = reject(edit(plain, plain.with_name(f"x{ending}"), change))
    assert found[0] is kind and words in found[1]


def test_nifti_without_its_magic_bytes(plain: Path) -> None:
    change = ("<4s", 344, (b"abcd",))  # SimpleITK would take it for an Analyze file
    kind, reason = reject(edit(plain, plain.with_name("x.nii"), change))
    assert kind is Kind.HEADER and "belong to no such file" in reason
    kind, reason = reject(edit(plain, plain.with_name("y.nii.gz"), change))
    assert kind is Kind.HEADER and "magic bytes are b'abcd'" in reason


def test_big_endian_nifti_has_the_hash_of_its_twin(plain: Path) -> None:
    import nibabel

    twin = nibabel.Nifti1Image.from_filename(str(plain)).as_reoriented(np.array([[0, 1], [1, 1], [2, 1]]))
    header = twin.header.as_byteswapped(">")
    nibabel.Nifti1Image(np.asarray(twin.dataobj), twin.affine, header).to_filename(str(plain.with_name("big.nii")))
    assert plain.with_name("big.nii").read_bytes()[:4] == b"\0\0\x01\x5c"
    assert accept(plain.with_name("big.nii")).digest == accept(plain).digest


def test_text_headers_that_are_wrong(tmp_path: Path) -> None:
    meta, nrrd = save(tmp_path / "x.mha", body(0), compress=False), save(tmp_path / "x.nrrd", body(0), compress=False)

    def changed(path: Path, old: bytes, new: bytes) -> tuple[Kind, str]:
        target = path.with_name(f"y{path.suffix}")
        content = path.read_bytes()
        assert old in content
        target.write_bytes(content.replace(old, new, 1))
        return reject(target)

    assert changed(meta, b"DimSize = 12 14 10", b"DimSize = 12 -4 10")[0] is Kind.HEADER
    assert changed(meta, b"DimSize = 12 14 10", b"DimSize = 12 14")[0] is Kind.HEADER
    assert changed(meta, b"DimSize = 12 14 10", b"DimSize = 99999 99999 99")[0] is Kind.TOO_LARGE
    assert changed(meta, b"MET_SHORT", b"MET_WORDS") == (Kind.FORMAT, "ElementType 'MET_WORDS' is no plain number type")
    assert changed(meta, b"= LOCAL", b"= x.raw")[0] is Kind.FORMAT
    assert changed(meta, b"ElementDataFile", b"Elsewhere")[0] is Kind.HEADER
    assert changed(meta, b"CompressedData = False", b"CompressedData = True")[0] is Kind.COMPRESSION
    assert changed(meta, b"ElementSpacing = 0.8", b"ElementSpacing = 0.0")[0] in (Kind.GEOMETRY, Kind.HEADER)
    assert changed(nrrd, b"sizes: 12 14 10", b"sizes: 12 14 0")[0] is Kind.HEADER
    assert changed(nrrd, b"type: short", b"type: block")[0] is Kind.FORMAT
    assert changed(nrrd, b"encoding: raw", b"encoding: hex")[0] is Kind.FORMAT
    assert changed(nrrd, b"encoding: raw", b"encoding: raw\nbyte skip: 8")[0] is Kind.FORMAT
    assert changed(nrrd, b"encoding: raw", b"encoding: gzip")[0] is Kind.COMPRESSION
    assert changed(nrrd, b"\n\n", b"\n")[0] in (Kind.HEADER, Kind.FORMAT, Kind.BYTES)


def test_nrrd_with_bzip2_or_windows_line_ends(tmp_path: Path) -> None:
    import bz2

    source = save(tmp_path / "x.nrrd", body(0), compress=False)
    header, _, voxels = source.read_bytes().partition(b"\n\n")
    packed = tmp_path / "y.nrrd"
    content = header.replace(b"encoding: raw", b"encoding: bzip2") + b"\n\n" + bz2.compress(voxels)
    packed.write_bytes(content)
    assert scan(str(packed), declared(str(packed), "nrrd")).digest == accept(source).digest
    packed.write_bytes(content[:-100])
    with pytest.raises(RejectedError) as caught:
        scan(str(packed), declared(str(packed), "nrrd"))
    assert caught.value.kind is Kind.COMPRESSION
    windows = tmp_path / "z.nrrd"
    windows.write_bytes(header.replace(b"\n", b"\r\n") + b"\r\n\r\n" + voxels)
    assert scan(str(windows), declared(str(windows), "nrrd")).digest == accept(source).digest


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_numbers_that_are_not_finite(tmp_path: Path, ending: str, value: float) -> None:
    array = body(1).astype(np.float32)
    array[7, 1, 2] = value
    kind, reason = reject(save(tmp_path / f"x{ending}", array))
    assert kind is Kind.NON_FINITE and f"voxel (2, 1, 7) (x, y, z) is {value}" in reason


def test_place_of_a_bad_voxel_beyond_the_first_chunk(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(12, 200, 300)).astype(np.float64)
    array[11, 150, 299] = np.inf
    assert "voxel (299, 150, 11)" in reject(save(tmp_path / "x.nii.gz", array))[1]


def test_small_constant_and_strange_volumes(tmp_path: Path) -> None:
    assert reject(save(tmp_path / "c.nii.gz", np.full(SHAPE, 3.5, np.float32))) == (
        Kind.CONSTANT,
        "every voxel has the same value (3.5)",
    )
    assert reject(save(tmp_path / "s.mha", body(0, (20, 4, 4))))[0] is Kind.GEOMETRY
    colour = sitk.GetImageFromArray(np.zeros((*SHAPE, 3), np.uint8), isVector=True)
    sitk.WriteImage(colour, str(tmp_path / "v.mha"))
    assert reject(tmp_path / "v.mha")[0] in (Kind.FORMAT, Kind.HEADER)
    sitk.WriteImage(colour, str(tmp_path / "v.nrrd"))
    assert reject(tmp_path / "v.nrrd")[0] in (Kind.DIMENSION, Kind.HEADER)
    assert accept(save(tmp_path / "one.nii.gz", body(0, (1, 20, 24)))).dimension == 2
    assert accept(save(tmp_path / "flat.nii.gz", body(0, (20, 24)))).shape == (1, 20, 24)


def test_memory_does_not_grow_with_what_a_file_declares_or_unpacks_to(tmp_path: Path, plain: Path) -> None:
    """A gzip bomb behind an honest-looking header, and one behind a huge one: a few megabytes each."""
    header = plain.read_bytes()[:HEADER]
    zeros = tmp_path / "zeros.nii"
    zeros.write_bytes(header)
    huge = edit(zeros, tmp_path / "huge.nii", ("<8h", 40, (3, 100, 700, 500, 1, 1, 1, 1))).read_bytes()
    members = gzip.compress(bytes(1 << 26))
    small_bomb, large_bomb = tmp_path / "small.nii.gz", tmp_path / "large.nii.gz"
    small_bomb.write_bytes(gzip.compress(header) + members * 2)
    large_bomb.write_bytes(gzip.compress(huge) + members * 2)  # 128 MB where 70 MB are declared
    packer = zlib.compressobj()
    meta = b"ObjectType = Image\nNDims = 3\nDimSize = 100 700 500\nElementType = MET_SHORT\nCompressedData = True\n"
    inflated = tmp_path / "zlib.mha"
    with inflated.open("wb") as handle:
        handle.write(meta + b"ElementDataFile = LOCAL\n")
        for _ in range(2):
            handle.write(packer.compress(bytes(1 << 26)))
        handle.write(packer.flush())
    accept(plain)  # imports and first use outside the measurement
    tracemalloc.start()
    answers = {path.name: reject(path) for path in (small_bomb, large_bomb, inflated)}
    limited = reject(large_bomb, max_voxels=34_999_999)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {name: kind for name, (kind, _) in answers.items()} == {
        "small.nii.gz": Kind.BYTES,
        "large.nii.gz": Kind.BYTES,
        "zlib.mha": Kind.BYTES,
    }
    assert limited == (Kind.TOO_LARGE, "its header declares 35000000 voxels; the limit is 34999999")
    assert peak < 16 << 20


def test_formats_are_told_from_their_first_bytes(tmp_path: Path, plain: Path) -> None:
    assert sniff(plain.read_bytes()[:1024]) == "nifti"
    assert sniff(gzip.compress(plain.read_bytes())[:1024]) == "nifti.gz"
    assert sniff(gzip.compress(b"text")) == "gzip"
    assert sniff(b"") is None and sniff(b"\0" * 1024) is None
    for source, target in ((plain, "x.nii.gz"), (save(tmp_path / "a.nrrd", body(3)), "y.mha")):
        wrong = tmp_path / target
        wrong.write_bytes(source.read_bytes())
        kind, reason = reject(wrong)
        assert kind is Kind.SUFFIX and "its bytes are" in reason


# --- pictures -----------------------------------------------------------------------------------------------------


def test_pictures_of_the_majority(tmp_path: Path) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(4):
        picture = np.clip(body(index, (30, 40)), 0, 255).astype(np.uint8)
        io.imsave(folder / f"grey{index}.png", picture, check_contrast=False)
        tifffile.imwrite(folder / f"grey{index}.tif", picture.astype(np.uint16) + 300)
    for index in range(3):
        colours = np.clip(body(index, (30, 40, 3)), 0, 255).astype(np.uint8)
        io.imsave(folder / f"colour{index}.png", colours, check_contrast=False)
    whole = (folder / "grey0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:-100])
    (folder / "huge.png").write_bytes(whole[:16] + b"\x7f\xff\xff\xff" * 2 + whole[24:])
    (folder / "bits.png").write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
    io.imsave(folder / "black.png", np.zeros((30, 40), np.uint8), check_contrast=False)
    io.imsave(folder / "tiny.png", np.arange(16, dtype=np.uint8).reshape(4, 4), check_contrast=False)
    tifffile.imwrite(folder / "stack.tif", np.random.default_rng(0).integers(0, 9, (5, 30, 40), np.uint8))
    tifffile.imwrite(folder / "nan.tif", np.where(body(9, (30, 40)) > 300, np.nan, 1).astype(np.float32))
    strips = (folder / "grey1.tif").read_bytes()
    (folder / "cut.tif").write_bytes(strips[:-500])
    save(folder / "volume.nii.gz", body(0))

    outcome = start(folder, tmp_path / "raw")

    assert {Path(entry.path).name: entry.kind for entry in outcome.rejections} == {
        "bits.png": Kind.CRASH,
        "black.png": Kind.CONSTANT,
        "colour0.png": Kind.DIMENSION,
        "colour1.png": Kind.DIMENSION,
        "colour2.png": Kind.DIMENSION,
        "cut.png": Kind.BYTES,
        "cut.tif": Kind.BYTES,
        "huge.png": Kind.TOO_LARGE,
        "nan.tif": Kind.NON_FINITE,
        "stack.tif": Kind.DIMENSION,
        "tiny.png": Kind.GEOMETRY,
        "volume.nii.gz": Kind.DIMENSION,
    }
    reasons = {Path(entry.path).name: entry.reason for entry in outcome.rejections}
    assert reasons["colour0.png"] == (
        "2D pictures (PNG, TIFF) with 3 channels among 8 images that are 2D pictures (PNG, TIFF) with 1 channel"
    )
    assert {case.reader for case in outcome.cases} == {"NaturalImage2DIO"} and len(outcome.cases) == 8
    for case in outcome.cases:
        label = str(tmp_path / "raw" / "Dataset901_Scans" / case.label)
        assert label.endswith(".png") and verify_labels(label, NaturalImage2DIO, [0, 1])
        assert check_cases([case.image], label, 1, NaturalImage2DIO)


def test_colour_pictures_have_their_channels(tmp_path: Path) -> None:
    import json

    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(2):
        colours = np.clip(body(index, (30, 40, 3)), 0, 255).astype(np.uint8)
        io.imsave(folder / f"colour{index}.png", colours, check_contrast=False)
    outcome = start(folder, tmp_path / "raw")
    assert [case.channels for case in outcome.cases] == [3, 3]
    content = json.loads((tmp_path / "raw" / "Dataset901_Scans" / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "R", "1": "G", "2": "B"} and content["file_ending"] == ".png"
