"""Checkpoints that survive a kill at any moment, and that load without running code from the file.

A file is written beside its target, flushed to the disk and renamed over it, so the target is always whole: the old
one or the new one. What is stored are tensors and plain Python values, so ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_umit.files import replace
from nnunet_umit.trainers.batches import loader_died

FORMAT = 1
LATEST, PREVIOUS = "checkpoint_latest.pth", "checkpoint_previous.pth"
FINAL, BEST = "checkpoint_final.pth", "checkpoint_best.pth"
FIRST = "checkpoint_first.pth"  # becomes the latest when those of a former training are out of the way
STOCK_KEYS = ("network_weights", "optimizer_state", "logging", "current_epoch", "init_args", "trainer_name")
_OVERHEAD = 4 << 20  # bytes: pickle, zip directory, logging


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message says why and what to do."""


def to_plain(value: Any) -> Any:
    """Tensors on the CPU and plain Python values only: what ``weights_only=True`` accepts, on any machine.

    numpy numbers become Python numbers and arrays become lists: one ``numpy.float64`` is enough to make a file
    unreadable with ``weights_only=True``. Devices, dtypes and paths become text.

    Raises:
        TypeError: a value that has no plain form.
    """
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        # a view would drag its whole storage into the file
        return tensor.clone() if tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes() else tensor
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_plain(item) for item in value)
    if isinstance(value, (list, set, frozenset)):
        return [to_plain(item) for item in value]
    if isinstance(value, (torch.device, torch.dtype, os.PathLike)):
        return str(value)
    for plain in (bool, int, float, str):  # sub-classes such as torch's version string
        if isinstance(value, plain):
            return plain(value)
    raise TypeError(f"{type(value).__name__} {value!r} cannot be stored in a checkpoint; store plain values")


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(item) for item in value)
    return 0


def atomic_save(content: Mapping[str, Any], path: str | Path, *, previous: str | Path | None = None) -> None:
    """Write ``content`` so that ``path`` is whole at every moment, even if the process or the machine dies.

    Args:
        content: stored through ``to_plain``.
        path: the target; replaced in one step.
        previous: where the present file at ``path`` is kept, if there is one.

    Raises:
        CheckpointError: no room on the disk, or writing failed; what was at ``path`` is still there.
    """
    path = Path(path)
    plain = to_plain(content)
    needed = tensor_bytes(plain) + _OVERHEAD
    require_space(path.parent, needed, what=str(path))
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, Path(previous))
        replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        if loader_died(error):  # torch tells it wherever the main process happens to be
            raise
        raise CheckpointError(
            f"could not write {path}: {error}. The file that was there before is intact; check the disk "
            f"({shutil.disk_usage(path.parent).free / 1e9:.2f} GB free) and continue with --c"
        ) from error
    _sync_folder(path.parent)


def require_space(folder: Path, needed: int, what: str) -> None:
    """Complain before writing, not in the middle of it.

    Raises:
        CheckpointError: fewer than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{what} needs {needed / 1e9:.3f} GB but only {free / 1e9:.3f} GB are free in {folder}; nothing was "
            "written and the old checkpoint is intact. Free some space and continue with --c"
        )


def _keep(path: Path, previous: Path) -> None:
    """Give the present file a second name without a moment in which it has none (hard link, or a copy)."""
    second = previous.with_name(f".{previous.name}.part")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:  # file systems without hard links
        shutil.copyfile(path, second)
    replace(second, previous)
    second.unlink(missing_ok=True)  # POSIX renames nothing if both names are the same file already


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable, where folders can be asked to: Windows needs no such step, and some mounts
    (shares of virtual machines, FUSE) refuse it."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # the file is renamed already
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def aside(path: Path, finished: bool) -> Path | None:
    """Where something that a former training left goes: ``old_<name>``, numbered where that is taken.

    Checkpoints of one training that was begun again and again and did not end share a place: the one with most epochs
    keeps it.

    Args:
        path: what was left.
        finished: whether that training ended; its best model is numbered like its final one.

    Returns:
        The place, or None where ``path`` is worth nothing: no epoch is done, or one of the same training is further.
    """
    began = None if finished or path.name not in (BEST, LATEST) else _readable(path)
    if began and began["current_epoch"] == 0:
        return None
    number, old = 1, path.with_name(f"old_{path.name}")
    while old.exists():
        former = _readable(old) if began else None
        if began and former and _what_is_trained(began) == _what_is_trained(former):
            return None if former["current_epoch"] > began["current_epoch"] else old
        number += 1
        old = path.with_name(f"old_{path.stem}_{number}{path.suffix}")
    return old


def _readable(path: Path) -> dict[str, Any] | None:
    """Content of a checkpoint, None where it cannot be read."""
    try:
        return read_checkpoint(path)
    except CheckpointError:
        return None


def _what_is_trained(content: dict[str, Any]) -> tuple[Any, ...]:
    """What two starts of the same command have in common."""
    return tuple(content["umit"][name] for name in ("section", "config", "architecture", "transfer"))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read one file written by ``atomic_save``, to the CPU, without unpickling anything but plain values.

    Raises:
        CheckpointError: missing, damaged, or not written by a UMIT trainer.
    """
    path = Path(path)
    if path.name == BEST and not path.is_file() and path.with_name(FINAL).is_file():
        raise CheckpointError(f"there is no {path}, but a {FINAL} beside it: leave --val_best away")
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint {path}; train first: nnUNetv2_train DATASET CONFIGURATION FOLD -tr UMITTrainer "
            "-p UMITPlans"
        )
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} ({path.stat().st_size} bytes) is damaged: it is not a complete checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, so it was not written by a UMIT trainer and is not "
            f"loaded: {str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    missing = [key for key in (*STOCK_KEYS, "umit") if not isinstance(content, dict) or key not in content]
    if missing:
        raise CheckpointError(f"{path} was not written by a UMIT trainer: it has no {', '.join(missing)}")
    if content["umit"].get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {content['umit'].get('format')}, this version of nnunet-umit reads {FORMAT}"
        )
    return content


def read_with_fallback(path: str | Path, log: Any = print) -> dict[str, Any]:
    """Read a checkpoint; a damaged ``checkpoint_latest.pth`` is replaced by the previous one, loudly.

    Raises:
        CheckpointError: neither can be read.
    """
    path = Path(path)
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        previous = path.with_name(PREVIOUS)
        if path.name != LATEST or not previous.is_file():
            raise
        log(f"WARNING: {error}. Falling back to {previous.name}; the epochs since then are trained again.")
        try:
            return read_checkpoint(previous)
        except CheckpointError as second:
            raise CheckpointError(f"{error}; and the fallback failed as well: {second}") from second


def differences(stored: Mapping[str, Any], present: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Readable lines for every key whose value differs between two nested dictionaries."""
    lines: list[str] = []
    for key in sorted({*stored, *present}, key=str):
        name = f"{prefix}{key}"
        old, new = stored.get(key, "(absent)"), present.get(key, "(absent)")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{name}.")
        elif _listed(old) != _listed(new):
            lines.append(f"{name}: {old!r} in the checkpoint, {new!r} now")
    return lines


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def state_mismatch(
    stored: Mapping[str, torch.Tensor], present: Mapping[str, torch.Tensor], limit: int = 5
) -> list[str]:
    """What keeps ``stored`` from loading into ``present``: missing, unexpected and differently shaped entries."""
    lines = [f"missing in the checkpoint: {key}" for key in present if key not in stored]
    lines += [f"not in the network: {key}" for key in stored if key not in present]
    lines += [
        f"{key}: shape {tuple(stored[key].shape)} in the checkpoint, {tuple(present[key].shape)} in the network"
        for key in present
        if key in stored and stored[key].shape != present[key].shape
    ]
    return lines if len(lines) <= limit else [*lines[:limit], f"... and {len(lines) - limit} more"]
