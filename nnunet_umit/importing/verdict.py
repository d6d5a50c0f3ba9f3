"""What is said about one file: a case of the new dataset, or a reason why not."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Kind(str, Enum):
    """Why something is in quarantine, as the summary counts it."""

    UNREADABLE = "unreadable"
    EMPTY = "zero bytes"
    SUFFIX = "wrong suffix"
    FORMAT = "unsupported format"
    COMPRESSION = "damaged compression"
    HEADER = "wrong header"
    BYTES = "header against bytes"
    TOO_LARGE = "too large"
    GEOMETRY = "geometry"
    DIMENSION = "dimension"
    NON_FINITE = "NaN or infinite"
    CONSTANT = "constant"
    DUPLICATE = "duplicate"
    FOLDER = "folder loop or repetition"
    CRASH = "reader failed"


class RejectedError(Exception):
    """Raised while a file is judged; becomes its quarantine entry.

    Args:
        kind: The row of the summary it is counted in.
        reason: What is wrong, with the value and the limit.
        fix: What to do about it.
    """

    def __init__(self, kind: Kind, reason: str, fix: str) -> None:
        super().__init__(kind, reason, fix)  # all three, so that the exception survives pickling
        self.kind, self.reason, self.fix = kind, reason, fix


class OutputError(RuntimeError):
    """The new dataset cannot be written (disk full, no permission): no file's fault, so it ends the run."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something that may become a case: one file, or the files of one DICOM series.

    Args:
        path: Absolute path of the file; of the folder for a series.
        relative: The same below the imported folder, with ``/``; order and case name come from it.
        case: nnU-Net's identifier. It depends on `relative` alone, so it stays when files come or go.
        state: Size and time of the bytes, to know after an interruption whether the verdict still stands.
        files: File names of a DICOM series in slice order, below `path`; empty for a single file.
    """

    path: str
    relative: str
    case: str
    state: str
    files: tuple[str, ...] = ()

    @property
    def uid(self) -> str:
        """Series Instance UID of a DICOM series."""
        return self.relative.rpartition("/")[2]

    @property
    def shown(self) -> str:
        """Path of the file, or of the first file of a series."""
        return os.path.join(self.path, self.files[0]) if self.files else self.path

    @property
    def addition(self) -> str:
        """What tells a series from others in its folder; nothing for a single file."""
        return f" (DICOM series {self.uid}, files: {len(self.files)})" if self.files else ""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """One line of the quarantine list."""

    path: str
    kind: Kind
    reason: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Case:
    """One usable image. Axis order is nnU-Net's: (z, y, x), spacing in millimetres; a picture has one slice.

    Args:
        path: Absolute path of its file, or of the first file of its DICOM series.
        image: What dataset.json refers to: an absolute path, or one relative to the dataset (converted DICOM).
        label: The body mask, relative to the dataset.
        reader: Name of nnU-Net's reader for image and label.
        channels: 1, or 3 and 4 for colour pictures.
        low: Smallest voxel value as nnU-Net reads it.
        high: Largest one.
        digest: Hash of the voxels with their type and shape: equal for equal images, however compressed.
    """

    name: str
    path: str
    relative: str
    image: str
    label: str
    reader: str
    channels: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    low: float
    high: float
    digest: str

    @property
    def dimension(self) -> int:
        """2 for a picture or a single slice, else 3."""
        return 2 if self.shape[0] == 1 else 3

    @property
    def voxels(self) -> int:
        """Voxels of one channel."""
        return self.shape[0] * self.shape[1] * self.shape[2]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to one candidate: exactly one of `case` and `rejection`."""

    relative: str
    state: str
    case: Case | None = None
    rejection: Rejection | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Verdict:
        """From what `to_dict` wrote and JSON kept.

        Raises:
            KeyError, TypeError, ValueError: For anything else.
        """
        case, rejection = content["case"], content["rejection"]
        if case is not None:
            case = Case(**{**case, "shape": tuple(case["shape"]), "spacing": tuple(case["spacing"])})
        if rejection is not None:
            rejection = Rejection(**{**rejection, "kind": Kind(rejection["kind"])})
        return cls(relative=content["relative"], state=content["state"], case=case, rejection=rejection)


def rejected(candidate: Candidate, error: RejectedError) -> Verdict:
    """The verdict for a candidate whose judgement raised `error`."""
    reason = error.reason + candidate.addition
    entry = Rejection(path=candidate.shown, kind=error.kind, reason=reason, fix=error.fix)
    return Verdict(relative=candidate.relative, state=candidate.state, rejection=entry)
