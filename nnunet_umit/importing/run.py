"""The whole import, from a folder to a dataset."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nnunet_umit import __version__
from nnunet_umit.importing import dataset
from nnunet_umit.importing.dicom import Folder, join, survey
from nnunet_umit.importing.discover import Found, discover
from nnunet_umit.importing.journal import Journal
from nnunet_umit.importing.judge import IMAGES, LABELS, judge, quiet
from nnunet_umit.importing.settle import settle
from nnunet_umit.importing.verdict import (
    Candidate,
    Case,
    Kind,
    OutputError,
    RejectedError,
    Rejection,
    Verdict,
    rejected,
)
from nnunet_umit.importing.workers import each

TRANSIENT = (Kind.CRASH, Kind.UNREADABLE)  # may differ next time, though the bytes are the same
MAX_VOXELS = 1 << 29  # 512 x 512 x 2048: a whole-body CT


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to import and where to.

    Args:
        folder: The images, in any sub-folders.
        raw: nnU-Net's folder of raw datasets.
        name: ``Dataset901_Scans``; see `dataset.folder_name`.
        modality: Name of the channel of grey images; nnU-Net normalises ``CT`` differently from all others.
        jobs: Processes; 0 works in this one.
        max_voxels: More in one image is refused by its header.
        overwrite: Replace an earlier import of the same name.
        exclude: Patterns of names or relative paths to leave out.
    """

    folder: Path
    raw: Path
    name: str
    modality: str = "MRI"
    jobs: int = 1
    max_voxels: int = MAX_VOXELS
    overwrite: bool = False
    exclude: tuple[str, ...] = ()

    @property
    def target(self) -> Path:
        return self.raw / self.name


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of it.

    Args:
        cases: In the dataset; when there are none, no dataset was written.
        rejections: In quarantine, by path.
        ignored: Files that are no images, counted by suffix.
        quarantine: The list on disk.
        resumed: Verdicts taken over from an interrupted import.
    """

    cases: list[Case]
    rejections: list[Rejection]
    ignored: Counter[str] = field(default_factory=Counter)
    quarantine: Path
    resumed: int

    @property
    def exit_code(self) -> int:
        """0 when all is well, 1 when something is in quarantine, 2 when nothing is usable."""
        if not self.cases:
            return 2
        return 1 if self.rejections else 0


def import_folder(request: Request, progress: Callable[[int, int], None]) -> Outcome:
    """Find, judge, settle, write. The dataset appears under its name when it is whole, and not before.

    Args:
        request: What to do.
        progress: Told the number of judged files and of all files, after each.

    Raises:
        RequestError: For a request that cannot be carried out.
        OutputError: When the disk is full or closed; like Ctrl-C it leaves the verdicts so far, and the same request
            goes on from there.
    """
    if not request.folder.is_dir():
        raise dataset.RequestError(f"{request.folder} is not a folder; give the folder that holds the images")
    dataset.check_place(request.raw, request.name, request.overwrite)
    staging = dataset.staging_folder(request.raw, request.name)
    try:
        for part in (LABELS, IMAGES):
            (staging / part).mkdir(parents=True, exist_ok=True)
        found = discover(request.folder, request.exclude, avoid=(str(staging), str(request.target)))
        conditions = {"version": __version__, "max_voxels": request.max_voxels, "folder": str(request.folder.resolve())}
        candidates, rejections = _candidates(request, found)
        with Journal(staging / dataset.JOURNAL, conditions) as journal:
            verdicts, resumed = _verdicts(request, candidates, staging, journal, progress)
        cases, late = settle([verdict.case for verdict in verdicts if verdict.case is not None])
        rejections += [verdict.rejection for verdict in verdicts if verdict.rejection is not None] + late
        rejections.sort(key=lambda entry: entry.path)
        quarantine = _write(request, staging, cases, rejections)
    except OSError as error:
        raise OutputError(f"cannot write {staging} ({error})") from error
    return Outcome(cases=cases, rejections=rejections, ignored=found.ignored, quarantine=quarantine, resumed=resumed)


def _candidates(request: Request, found: Found) -> tuple[list[Candidate], list[Rejection]]:
    """Files and DICOM series, and what is rejected before anyone looks into it."""
    series, rejections = list[Candidate](), list(found.rejections)
    root = os.path.abspath(request.folder)  # as `discover` has it: without ..
    folders = [
        Folder(path, Path(path).relative_to(root).as_posix(), tuple(files)) for path, files in found.dicom.items()
    ]
    with closing(each(survey, folders, min(request.jobs, len(folders)), quiet)) as surveys:
        for done in surveys:
            if done.result is None:
                reason = f"reading the headers of its {len(done.item.files)} DICOM files killed the process"
                fix = "Move half of the files elsewhere until the one is found"
                rejections.append(Rejection(path=done.item.path, kind=Kind.CRASH, reason=reason, fix=fix))
            else:
                series += done.result.series
                rejections += done.result.rejections
    return [*found.candidates, *join(series)], rejections


def _verdicts(
    request: Request,
    candidates: list[Candidate],
    staging: Path,
    journal: Journal,
    progress: Callable[[int, int], None],
) -> tuple[list[Verdict], int]:
    """A verdict on every candidate, and how many were known from before."""
    verdicts: list[Verdict] = []
    fresh: list[Candidate] = []
    for candidate in candidates:
        verdict = journal.find(candidate)
        if verdict is not None and _written(verdict, staging):
            verdicts.append(verdict)
        else:
            fresh.append(candidate)
    known = len(verdicts)
    progress(len(verdicts), len(candidates))
    task = partial(judge, destination=str(staging), max_voxels=request.max_voxels)
    with closing(each(task, fresh, min(request.jobs, len(fresh)), quiet)) as judged:
        for done in judged:
            verdict = done.result if done.result is not None else _killed(done.item)
            if verdict.rejection is None or verdict.rejection.kind not in TRANSIENT:
                journal.add(verdict)
            verdicts.append(verdict)
            progress(len(verdicts), len(candidates))
    return verdicts, known


def _written(verdict: Verdict, staging: Path) -> bool:
    """Whether the files of a remembered case, if it is one, are still there."""
    case = verdict.case
    return case is None or ((staging / case.label).is_file() and (staging / case.image).is_file())


def _killed(candidate: Candidate) -> Verdict:
    reason = "reading it killed the process that did, twice (out of memory, or a crash in the reader)"
    fix = "Use fewer --jobs or more memory, or convert it again from its source"
    return rejected(candidate, RejectedError(Kind.CRASH, reason, fix))


def _write(request: Request, staging: Path, cases: list[Case], rejections: list[Rejection]) -> Path:
    """Complete the dataset and move it to its place; without cases only the quarantine list stays."""
    dataset.write_quarantine(staging / dataset.QUARANTINE, rejections)
    if not cases:
        return staging / dataset.QUARANTINE
    dataset.prune(staging, cases)
    content = dataset.describe(cases, request.modality, str(request.folder.resolve()), len(rejections))
    (staging / "dataset.json").write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
    dataset.publish(staging, request.target)
    return request.target / dataset.QUARANTINE
