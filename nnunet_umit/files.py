"""Writing files that are complete or not there: beside the old one first, then in its place."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

DELAYS = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between two attempts on Windows


def replace(part: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Rename ``part`` to ``path`` in one step, whatever is there.

    Windows refuses while another program has one of them open (a prediction that reads the checkpoint, a virus scanner,
    a viewer): there it is tried for a few seconds.

    Raises:
        OSError: it cannot be renamed; both files are as they were.
    """
    for delay in DELAYS if os.name == "nt" else ():
        try:
            os.replace(part, path)
        except PermissionError:
            time.sleep(delay)
        else:
            return
    os.replace(part, path)


def write_whole(file: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a hidden file beside ``file``, then :func:`replace` it; nothing is left where that fails."""
    file = Path(file)
    part = file.with_name(f".{file.name}.part")
    try:
        write(part)
        replace(part, file)
    finally:
        part.unlink(missing_ok=True)
