"""Are these files what they claim to be? Checks on files, then on arrays, then on a whole raw dataset folder.

Why a check before reading: SimpleITK reads a truncated ``.nii.gz`` as zeros without a word, so the damage is invisible
afterwards. Why a check after reading: one infinite voxel makes every normalised voxel of a case NaN, and training goes
on.

Array legend: C channels (or 1 for labels), then space; images are float, labels any number type.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_umit.plans import nifti

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_SHOWN = 10  # how many offending values or files an error lists before it only counts them


class BadImageError(ValueError):
    """A file or array that must not be trained on. One message, so that it crosses process boundaries unchanged."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a dataset: where, what, and what to do about it."""

    path: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}. {self.fix}"


# ---------------------------------------------------------------------------------------------------------------------
# files


def file_problem(path: str | os.PathLike[str]) -> Problem | None:
    """What is wrong with the bytes of one image or label file, or None.

    Covers: missing, empty, broken or truncated gzip (its CRC is verified), fewer voxel bytes than the NIfTI header
    declares, NaN or infinite voxels in a NIfTI file (SimpleITK reads them as zeros, which in CT is water), PNG without
    its end marker. NIfTI files are read through once for this. Other formats are left to their readers.
    """
    path = os.fspath(path)
    try:
        return _bytes_problem(path)
    except OSError as error:
        fix = "Check its permissions, and the disk or share that it lies on"
        return Problem(path, f"cannot be read ({error.strerror or error})", fix)


def _bytes_problem(path: str) -> Problem | None:
    fix = f"Copy or convert {os.path.basename(path)} again from its source, or remove the case from the dataset"
    if not os.path.isfile(path):
        return Problem(path, "no such file", "Restore it, or remove the case from the dataset")
    size = os.path.getsize(path)
    if size == 0:
        return Problem(path, "the file is empty (0 bytes)", fix)
    name = path.lower()
    if name.endswith(".gz"):
        return _gzip_problem(path, fix)
    with open(path, "rb") as handle:
        if name.endswith(".nii"):
            reason = nifti.scan(handle)
            return Problem(path, reason, fix) if reason is not None else None
        if name.endswith(".png"):
            start = handle.read(len(_PNG_START))
            handle.seek(max(size - 64, 0))
            if start != _PNG_START:
                return Problem(path, f"not a PNG file (it starts with {start!r})", fix)
            if _PNG_END not in handle.read():
                return Problem(path, f"truncated: {size} bytes without the PNG end marker", fix)
    return None


def _gzip_problem(path: str, fix: str) -> Problem | None:
    try:
        with gzip.open(path, "rb") as handle:
            reason = nifti.scan(handle) if path.lower().endswith(".nii.gz") else None
            while handle.read(_CHUNK):  # to the end, where the CRC is
                pass
    except EOFError:
        return Problem(path, f"truncated: the gzip stream ends early, {os.path.getsize(path)} bytes on disk", fix)
    except (gzip.BadGzipFile, zlib.error) as error:
        return Problem(path, f"damaged gzip stream ({error})", fix)
    return Problem(path, reason, fix) if reason is not None else None


# ---------------------------------------------------------------------------------------------------------------------
# arrays


def array_problem(image_CDHW: NDArray[Any], files: Sequence[str], may_be_constant: bool = False) -> Problem | None:
    """What is wrong with the voxels of one case, or None.

    Args:
        image_CDHW: channels first, any number of space axes.
        files: the files the channels came from: one per channel, or one file that holds them all.
        may_be_constant: as a black slice among others to be predicted is; there is nothing to learn from it, though.

    A constant channel among others is only logged: an absent MR sequence is often stored as zeros.
    """
    constant = []
    for channel, voxels in enumerate(image_CDHW):
        file = str(files[channel] if len(files) == len(image_CDHW) else ", ".join(map(str, files)))
        finite = np.isfinite(voxels)
        if not finite.all():
            bad = int(voxels.size - np.count_nonzero(finite))
            first = tuple(int(i) for i in np.argwhere(~finite)[0])
            return Problem(
                file,
                f"channel {channel} holds {bad} of {voxels.size} voxels that are NaN or infinite, the first is "
                f"{voxels[first]} at array index {first}; every voxel must be finite",
                "Replace such voxels by a value that means background (numpy.nan_to_num does) and save the file again",
            )
        if voxels.size and voxels.min() == voxels.max():
            constant.append((channel, file, float(voxels.flat[0])))
    if len(constant) == len(image_CDHW) and not may_be_constant:
        value = ", ".join(f"{item[2]:g}" for item in constant)
        return Problem(
            ", ".join(dict.fromkeys(item[1] for item in constant)),
            f"every voxel has the same value ({value}) in all {len(image_CDHW)} channels; at least one must vary",
            "Export the image again, or remove the case from the dataset",
        )
    for channel, file, level in constant:
        logger.warning("%s: channel %d is constant (%g); the image is used as it is", file, channel, level)
    return None


def channel_problem(channels: int, dataset_json: dict[str, Any], files: Sequence[str]) -> Problem | None:
    """Another number of channels than dataset.json declares, or None."""
    declared = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    if not declared or channels == len(declared):
        return None
    reason = f"{channels} channels, dataset.json declares {len(declared)} ({', '.join(map(str, declared.values()))})"
    fix = "Add the missing files or remove the channels that are too many (opacity, for instance)"
    return Problem(", ".join(map(str, files)), reason, fix)


def label_problem(label: NDArray[Any], allowed: Iterable[int], file: str) -> Problem | None:
    """Label values that dataset.json does not declare, or None; see `allowed_labels` for what counts as declared."""
    legal = sorted(set(int(value) for value in allowed))
    found = np.unique(label)
    illegal = [value for value in found.tolist() if value not in legal]  # NaN is in no list, so it is found as well
    if not illegal:
        return None
    shown = ", ".join(f"{value:g}" for value in illegal[:_SHOWN]) + (", …" if len(illegal) > _SHOWN else "")
    voxels = int(np.count_nonzero(~np.isin(label, legal)))
    return Problem(
        file,
        f"label value {shown} in {voxels} voxels; dataset.json declares {legal}",
        'Correct the label file, or add the value to "labels" in dataset.json (values must be consecutive)',
    )


def allowed_labels(dataset_json: dict[str, Any]) -> list[int]:
    """All values a label file may hold, from ``dataset_json["labels"]``: background, classes, region parts, ignore."""
    values = {0}
    for value in dataset_json["labels"].values():
        values.update(int(part) for part in (value if isinstance(value, (list, tuple)) else [value]))
    return sorted(values)


# ---------------------------------------------------------------------------------------------------------------------
# a raw dataset folder


def check_dataset(dataset_folder: str | os.PathLike[str]) -> list[Problem]:
    """Everything wrong with a raw nnU-Net dataset folder, most basic first; an empty list means it can be planned.

    Reads every training image and label once with nnU-Net's own reader, and the bytes of every test image.
    """
    folder = Path(dataset_folder)
    dataset_json, problems = _read_dataset_json(folder)
    if dataset_json is None:
        return problems
    # Lazily: nnU-Net's readers import SimpleITK, nibabel and scikit-image.
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    cases = training_cases(folder, dataset_json)
    problems = _count_problems(folder, dataset_json, cases)
    images = [image for case in cases.values() for image in case["images"]]
    with contextlib.redirect_stderr(io.StringIO()):  # readers that cannot read the example print why
        try:
            reader_class = determine_reader_writer_from_dataset_json(dataset_json, images[0], verbose=False)
        except (IndexError, RuntimeError):  # no image, or one that no reader can read: that is told below, by case
            try:
                reader_class = determine_reader_writer_from_dataset_json(dataset_json, verbose=False)
            except RuntimeError as error:
                path, fix = str(folder / "dataset.json"), "Convert the images to a format that it reads, .nii.gz say"
                return [*problems, Problem(path, f"nnU-Net has no reader for them ({error})", fix)]
    for name, case in cases.items():
        files = [*case["images"], case["label"]]
        damaged = [problem for problem in map(file_problem, files) if problem is not None]
        problems += damaged or _case_problems(name, case, dataset_json, reader_class())
    test_folder = folder / "imagesTs"
    if test_folder.is_dir():
        tests = sorted(test_folder.glob("*" + dataset_json["file_ending"]))
        problems += [problem for problem in map(file_problem, tests) if problem is not None]
    return problems


def _read_dataset_json(folder: Path) -> tuple[dict[str, Any] | None, list[Problem]]:
    path = folder / "dataset.json"
    if not path.is_file():
        fix = "Check nnUNet_raw, or create the folder as nnU-Net's documentation/dataset_format.md describes"
        return None, [Problem(str(path), "no such file" if folder.is_dir() else "no such dataset folder", fix)]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return None, [Problem(str(path), f"not valid JSON ({error})", "Correct it in an editor")]
    missing = [key for key in ("channel_names", "labels", "numTraining", "file_ending") if key not in content]
    if missing:
        return None, [Problem(str(path), f"keys {missing} are missing", "Add them; see nnU-Net's dataset_format.md")]
    wrong = _wrong_values(content)
    if wrong:
        return None, [Problem(str(path), reason, fix) for reason, fix in wrong]
    if "dataset" not in content:
        for part in ("imagesTr", "labelsTr"):
            if not (folder / part).is_dir():
                return None, [Problem(str(folder / part), "no such folder", "Put the training files there")]
    return content, []


def _wrong_values(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Reason and fix of values of dataset.json that nothing can be done with."""
    wrong = []
    ending, labels = content["file_ending"], content["labels"]
    if not (isinstance(ending, str) and ending.startswith(".")):
        wrong.append((f"file_ending is {ending!r}", 'It must begin with a dot, ".nii.gz" for instance'))
    try:
        allowed_labels(content)
    except (AttributeError, TypeError, ValueError):
        fix = 'Write {"background": 0, "liver": 1}; nnUNetv2_convert_old_nnUNet_dataset does it for data of nnU-Net v1'
        wrong.append((f"labels are {labels}", fix))
    return wrong


def training_cases(folder: Path, dataset_json: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Case -> its image files and label file. nnU-Net's own rule, without the twelve processes it starts for it."""
    if "dataset" in dataset_json:
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        return dict(get_filenames_of_train_images_and_targets(str(folder), dataset_json))
    ending = dataset_json["file_ending"]
    cases: dict[str, dict[str, Any]] = {}
    for file in sorted((folder / "imagesTr").iterdir()):
        match = _numbered(ending).fullmatch(file.name)
        if match:
            label = str(folder / "labelsTr" / (match[1] + ending))
            cases.setdefault(match[1], {"images": [], "label": label})["images"].append(str(file))
    return cases


def _numbered(ending: str) -> re.Pattern[str]:
    return re.compile(r"(.+)_\d{4}" + re.escape(ending))


def _unnumbered(folder: Path, dataset_json: dict[str, Any]) -> list[str]:
    """Names in imagesTr that have the ending but no channel number; nnU-Net makes cases of them that have no images."""
    if "dataset" in dataset_json:
        return []
    ending = dataset_json["file_ending"]
    names = sorted(file.name for file in (folder / "imagesTr").iterdir() if file.name.endswith(ending))
    return [name for name in names if not _numbered(ending).fullmatch(name)]


def _count_problems(folder: Path, dataset_json: dict[str, Any], cases: dict[str, Any]) -> list[Problem]:
    path, problems = str(folder / "dataset.json"), []
    unnumbered = _unnumbered(folder, dataset_json)
    if unnumbered:
        shown = ", ".join(unnumbered[:_SHOWN]) + (", …" if len(unnumbered) > _SHOWN else "")
        fix = f"Rename them to end with _0000{dataset_json['file_ending']} (the number of the channel), or remove them"
        reason = f"{len(unnumbered)} names without the number of a channel: {shown}"
        problems.append(Problem(str(folder / "imagesTr"), reason, fix))
    elif len(cases) != dataset_json["numTraining"]:
        reason = f"numTraining is {dataset_json['numTraining']}, but {len(cases)} cases were found"
        problems.append(Problem(path, reason, f"Set numTraining to {len(cases)}, or restore the missing cases"))
    known = {os.path.basename(case["label"]) for case in cases.values()}.union(unnumbered)
    for label in sorted((folder / "labelsTr").glob("*" + dataset_json["file_ending"])):
        if label.name not in known:
            problems.append(Problem(str(label), "no image in imagesTr belongs to it", "Add one, or remove the label"))
    values = allowed_labels(dataset_json)
    if values != list(range(len(values))):
        problems.append(Problem(path, f"label values {values} are not consecutive from 0", "Renumber the labels"))
    return problems


def _case_problems(name: str, case: dict[str, Any], dataset_json: dict[str, Any], reader: Any) -> list[Problem]:
    """Problems of one case whose files are whole: unreadable, wrong channel count, shapes, voxels, labels."""
    label_file = str(case["label"])
    try:
        image_CDHW, properties = reader.read_images(case["images"])
        label_1DHW, label_properties = reader.read_seg(label_file)
    except Exception as error:  # every reader has its own exceptions; the problem list is where they are reported
        grids = _grids(case["images"], reader)
        if len(set(grids.values())) > 1:
            reason = f"the channels of case {name} lie on different grids: {', '.join(grids.values())}"
            return [Problem(", ".join(case["images"]), reason, "Resample all channels to the grid of one")]
        reason = f"cannot be read ({type(error).__name__}: {error})"
        return [Problem(", ".join([*case["images"], label_file]), reason, "Convert the files again from their source")]
    if len(label_1DHW) != 1:
        reason = f"{len(label_1DHW)} channels; a label has one, with the number of a class in every voxel"
        return [Problem(label_file, reason, "Save one channel only")]
    found = [
        channel_problem(len(image_CDHW), dataset_json, case["images"]),
        array_problem(image_CDHW, case["images"]),
        label_problem(label_1DHW, allowed_labels(dataset_json), label_file),
    ]
    if image_CDHW.shape[1:] != label_1DHW.shape[1:]:
        reason = f"label shape {label_1DHW.shape[1:]} differs from image shape {image_CDHW.shape[1:]}"
        found.append(Problem(label_file, reason, "Resample the label to the grid of its image"))
    elif not np.allclose(properties["spacing"], label_properties["spacing"], rtol=1e-3):
        reason = f"label spacing {label_properties['spacing']} differs from image spacing {properties['spacing']} mm"
        found.append(Problem(label_file, reason, "Copy the image's header (spacing, origin, direction) to the label"))
    else:
        found.append(_turned(label_file, properties, label_properties))
    return [problem for problem in found if problem is not None]


def _grids(images: Sequence[str], reader: Any) -> dict[str, str]:
    """Shape and spacing of every image that can be read alone, for people."""
    grids = {}
    for image in images:
        try:
            voxels, properties = reader.read_images([image])
        except Exception:  # as above; what cannot be read at all is told by the caller
            continue
        spacing = " x ".join(f"{float(value):.4g}" for value in properties["spacing"])
        grids[image] = f"{' x '.join(map(str, voxels.shape[1:]))} voxels of {spacing} mm"
    return grids


def _turned(label_file: str, properties: dict[str, Any], label_properties: dict[str, Any]) -> Problem | None:
    """A label whose header says that it looks another way than its image; nnU-Net lays both on each other unturned."""
    read = [each["sitk_stuff"] for each in (properties, label_properties) if "sitk_stuff" in each]
    ways = [np.asarray(each["direction"]) for each in read]
    if len(ways) < 2 or (ways[0].shape == ways[1].shape and np.allclose(ways[0], ways[1], atol=0.01)):
        return None
    shown = [" ".join(f"{value:g}" for value in way.round(3)) for way in ways]
    fix = "See in a viewer that both lie on each other; then copy the image's header to the label, else resample it"
    return Problem(label_file, f"label direction {shown[1]} differs from image direction {shown[0]}", fix)
