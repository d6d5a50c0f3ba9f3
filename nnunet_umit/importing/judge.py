"""One candidate in, one verdict out; on the way the body mask, and for DICOM the converted image, are written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from nnunet_umit.importing import formats
from nnunet_umit.importing.loading import Loaded, load_series, load_volume, plain
from nnunet_umit.importing.mask import body_mask
from nnunet_umit.importing.verdict import Candidate, Case, Kind, OutputError, RejectedError, Verdict, rejected
from nnunet_umit.plans.integrity import file_problem

LABELS, IMAGES = "labelsTr", "imagesTr"


def quiet() -> None:
    """Settings of a process that judges: one file, one core; ITK's warnings do not tear the progress bar."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def judge(candidate: Candidate, destination: str, max_voxels: int) -> Verdict:
    """Judge one file or DICOM series and write what its case needs.

    Args:
        candidate: What to look at.
        destination: Folder of the new dataset, with ``labelsTr`` and ``imagesTr``.
        max_voxels: More than this in one image is refused before anything is allocated.

    Raises:
        OutputError: When the destination cannot be written. Nothing that is wrong with the candidate raises.
    """
    try:
        return _accept(candidate, Path(destination), max_voxels)
    except RejectedError as error:
        return rejected(candidate, error)
    except OutputError:
        raise
    except MemoryError:
        problem = RejectedError(Kind.CRASH, "does not fit into memory", "Use fewer --jobs, or more memory")
    except PermissionError as error:
        reason = f"cannot be opened ({error.strerror})"
        problem = RejectedError(Kind.UNREADABLE, reason, "chmod u+r, or run as its owner")
    except Exception as error:  # readers raise anything; here it becomes the reason, and the rest goes on
        reason = f"the reader failed ({type(error).__name__}: {plain(error)})"
        problem = RejectedError(Kind.CRASH, reason, "Convert it again from its source, or leave it out")
    return rejected(candidate, problem)


def _accept(candidate: Candidate, destination: Path, max_voxels: int) -> Verdict:
    unsafe = os.path.expandvars(candidate.path)
    if unsafe != candidate.path and not candidate.files:  # what a series becomes lies in the dataset
        reason = f"nnU-Net would replace the variable in its path and look for {unsafe}"
        raise RejectedError(Kind.FORMAT, reason, "Rename it without '$'")
    loaded = _load(candidate, max_voxels)
    mask_ZYX = body_mask(loaded.voxels_ZYX)
    label = f"{LABELS}/{candidate.case}{label_suffix(loaded.reader)}"
    image = f"{IMAGES}/{candidate.case}_0000.nii.gz" if candidate.files else candidate.path
    try:
        _write_mask(mask_ZYX, loaded, str(destination / label))
        if candidate.files and loaded.reference is not None:
            sitk.WriteImage(loaded.reference, str(destination / image), True)
    except Exception as error:  # SimpleITK says RuntimeError for a full disk
        raise OutputError(f"cannot write the files of {candidate.case} to {destination} ({plain(error)})") from error
    for written in (label, image) if candidate.files else (label,):
        problem = file_problem(destination / written)  # ITK says nothing where a disk fills up with the last kilobytes
        if problem is not None:
            raise OutputError(f"cannot write {problem.path} ({problem.reason}); is the disk full?")
    shape = loaded.voxels_ZYX.shape
    case = Case(
        name=candidate.case,
        path=candidate.shown,
        relative=candidate.relative,
        image=image,
        label=label,
        reader=loaded.reader,
        channels=loaded.channels,
        shape=(shape[0], shape[1], shape[2]),
        spacing=loaded.spacing,
        low=loaded.low,
        high=loaded.high,
        digest=loaded.digest,
    )
    return Verdict(relative=candidate.relative, state=candidate.state, case=case)


def label_suffix(reader: str) -> str:
    """The suffix of labels, which is the ``file_ending`` of a dataset read by `reader`."""
    return ".png" if reader == "NaturalImage2DIO" else ".nii.gz"


def _load(candidate: Candidate, max_voxels: int) -> Loaded:
    if candidate.files:
        return load_series(candidate, max_voxels)
    known = formats.suffix_of(candidate.path)
    if known is None:
        raise RejectedError(Kind.SUFFIX, "its suffix is not known", "Rename it")
    suffix, kind = known
    with open(candidate.path, "rb") as handle:
        head = handle.read(formats.HEAD)
    found = formats.sniff(head)
    if found == "gzip" and kind == "nifti.gz":
        found = kind  # the header check says what is wrong inside
    if found != kind:
        if found is None or found == "gzip":
            reason = f"named {suffix}, but its first bytes {head[:8]!r} belong to no such file"
            raise RejectedError(Kind.HEADER, reason, "Export or copy the image again from its source")
        reason = f"named {suffix}, but its bytes are {found}"
        raise RejectedError(Kind.SUFFIX, reason, f"Rename it to end with {formats.suffix_for(found)}")
    if kind in formats.PICTURES:
        from nnunet_umit.importing.pictures import load_picture  # scikit-image is slow to import

        return load_picture(candidate, kind, max_voxels)
    return load_volume(candidate, kind, max_voxels)


def _write_mask(mask_ZYX: NDArray[np.uint8], loaded: Loaded, path: str) -> None:
    if loaded.reference is None:
        from nnunet_umit.importing.pictures import save_mask

        save_mask(mask_ZYX, path)
        return
    label = sitk.GetImageFromArray(mask_ZYX if loaded.reference.GetDimension() == 3 else mask_ZYX[0])
    label.CopyInformation(loaded.reference)
    sitk.WriteImage(label, path, True)
