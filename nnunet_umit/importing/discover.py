"""Which files of a folder may be images: walks it once, opens only files whose suffix says nothing."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path

from nnunet_umit.importing import formats
from nnunet_umit.importing.verdict import Candidate, Kind, Rejection

_READ_BITS = 0o444
_NAME_LENGTH = 80  # characters of a case name that come from the path; below every file system's limit with the rest


@dataclass
class Found:
    """What a folder holds.

    Args:
        candidates: Single files, in the order of their relative paths.
        dicom: Folder -> names of its files that look like DICOM, with their state; see `dicom.survey`.
        rejections: What is known to be unusable without opening it.
        ignored: What is no image, counted by suffix.
    """

    candidates: list[Candidate] = field(default_factory=list)
    dicom: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def reject(self, path: str, kind: Kind, reason: str, fix: str) -> None:
        self.rejections.append(Rejection(path=path, kind=kind, reason=reason, fix=fix))


def discover(folder: str | os.PathLike[str], exclude: Iterable[str] = (), avoid: Iterable[str] = ()) -> Found:
    """Walk `folder` and sort what is in it.

    Links to files and folders are followed, real folders before linked ones; a folder is visited once, so a loop ends
    where it begins and is named.

    Args:
        folder: What to import.
        exclude: Patterns (``*_seg.nii.gz``, ``derivatives/*``) of names or relative paths to leave out.
        avoid: Folders that are not entered: the dataset that is about to be written.
    """
    root = os.path.abspath(folder)
    found, patterns = Found(), tuple(exclude)
    seen = {_identity(parent): str(parent) for parent in Path(os.path.realpath(root)).parents}
    seen.update({_identity(path): "" for path in avoid if os.path.isdir(path)})
    pending, links = [root], list[str]()
    while pending or links:
        here = pending.pop() if pending else links.pop(0)
        try:
            entries = _enter(here, seen, found)
        except OSError as error:
            found.reject(here, Kind.UNREADABLE, f"folder cannot be listed ({error.strerror})", "chmod u+rx")
            continue
        labelled = any(entry.name == "dataset.json" for entry in entries)
        for entry in entries:
            relative = os.path.relpath(entry.path, root).replace(os.sep, "/")
            if any(fnmatchcase(relative, pattern) or fnmatchcase(entry.name, pattern) for pattern in patterns):
                found.ignored["excluded"] += 1
            elif entry.name.startswith("."):
                found.ignored["hidden"] += 1
            elif not _is_folder(entry):
                _sort_file(entry, relative, found)
            elif labelled and entry.name in ("labelsTr", "labelsTs"):
                found.ignored["folders of labels"] += 1
            else:
                (links if entry.is_symlink() else pending).append(entry.path)
    found.candidates.sort(key=lambda candidate: candidate.relative)
    return found


def case_name(relative: str, suffix: str = "", extra: str = "") -> str:
    """nnU-Net's identifier for a file: readable from its path, unique and stable through a hash of that path alone.

    Args:
        relative: Path below the imported folder, with ``/``.
        suffix: Ending to leave out of the readable part.
        extra: What else tells this case from others of the same path, e.g. the UID of a DICOM series.
    """
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", relative[: len(relative) - len(suffix)])[-_NAME_LENGTH:].strip("_")
    digest = blake2b(f"{relative}\0{extra}".encode("utf-8", "surrogateescape"), digest_size=5).hexdigest()
    return f"{readable or 'case'}_{digest}"


def _identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or leads to one that can be looked at; a link that cannot be followed is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _enter(here: str, seen: dict[tuple[int, int], str], found: Found) -> list[os.DirEntry[str]]:
    """The entries of a folder by name; none, with a note why, when it was visited before or is closed."""
    status = os.stat(here)
    identity = status.st_dev, status.st_ino
    if identity in seen:
        before = seen[identity]
        if not before:
            return []
        if any(_identity(parent) == identity for parent in Path(here).parents):
            reason = f"folder loop: leads back to {before}, which holds it"
        else:
            reason = f"leads to {before}, which was visited already"
        found.reject(here, Kind.FOLDER, reason, "Remove the link, or leave it: nothing below it is lost")
        return []
    seen[identity] = here
    if not status.st_mode & _READ_BITS:
        raise PermissionError(13, f"mode {stat.filemode(status.st_mode)} lets nobody read")
    with os.scandir(here) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _sort_file(entry: os.DirEntry[str], relative: str, found: Found) -> None:
    known = formats.suffix_of(entry.name)
    extension = os.path.splitext(entry.name)[1].lower() or "no suffix"
    try:
        status = entry.stat()
    except OSError as error:
        if known is None and isinstance(error, FileNotFoundError):
            found.ignored[extension] += 1
            return
        target = f" to {os.readlink(entry.path)}" if entry.is_symlink() else ""
        reason = f"cannot be reached: {'link' if target else 'file'}{target} ({error.strerror})"
        found.reject(entry.path, Kind.UNREADABLE, reason, "Restore what the link points to, or remove it")
        return
    if not stat.S_ISREG(status.st_mode):
        found.ignored["devices, pipes and sockets"] += 1
        return
    if known is None:
        known = _sort_unknown(entry, extension, status, found)
        if known is None:
            return
    if not status.st_mode & _READ_BITS:
        reason = f"mode {stat.filemode(status.st_mode)} lets nobody read it"
        found.reject(entry.path, Kind.UNREADABLE, reason, "chmod u+r")
    elif status.st_size == 0:
        found.reject(entry.path, Kind.EMPTY, "the file is empty (0 bytes)", "Copy it again from its source")
    else:
        suffix, kind = known
        state = f"{status.st_size}:{status.st_mtime_ns}"
        if kind == "dicom":
            found.dicom.setdefault(os.path.dirname(entry.path), []).append((entry.name, state))
        else:
            name = case_name(relative, suffix)
            found.candidates.append(Candidate(path=entry.path, relative=relative, case=name, state=state))


def _sort_unknown(
    entry: os.DirEntry[str], extension: str, status: os.stat_result, found: Found
) -> tuple[str, formats.Format] | None:
    """A file whose suffix says nothing: DICOM often has none; a known image under another name is told so."""
    kind, picture = None, None
    if status.st_size and status.st_mode & _READ_BITS and entry.name.upper() != "DICOMDIR":
        try:
            with open(entry.path, "rb") as handle:
                head = handle.read(formats.HEAD)
        except OSError:
            extension = f"{extension} (unreadable)"
        else:
            kind, picture = formats.sniff(head), formats.foreign(head, extension)
    if kind == "dicom":
        return "", "dicom"
    if picture is not None:
        written = os.path.splitext(entry.name)[1]
        fix = f"Convert it to PNG, or leave such files out with --exclude '*{written}'"
        found.reject(entry.path, Kind.FORMAT, f"a {picture} picture, which is not imported", fix)
    elif kind is None or kind == "gzip":
        found.ignored[extension] += 1
    elif extension in formats.PAIRED:
        reason = f"{extension} is a header whose voxels are in a second file"
        found.reject(entry.path, Kind.FORMAT, reason, "Convert the pair to one .nii.gz or .mha file")
    else:
        reason = f"its bytes are {kind}, but its suffix is {extension}"
        found.reject(entry.path, Kind.SUFFIX, reason, f"Rename it to end with {formats.suffix_for(kind)}")
    return None
