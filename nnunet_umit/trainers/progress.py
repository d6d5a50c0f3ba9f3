"""How far an epoch has come: a bar in a terminal, now and then a plain line in a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import monotonic
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 60.0  # seconds between two lines of a log


class StepProgress:
    """Shows steps of one epoch at a time.

    Args:
        log: writes one line; used where standard output is not a terminal.
        shown: False on all ranks but the first.
    """

    def __init__(self, log: Callable[[str], Any], shown: bool = True) -> None:
        self.log = log
        self.shown = shown
        self._bar: Progress | None = None
        self._task: Any = None
        self._title, self._total, self._done = "", 0, 0
        self._started = self._last_line = 0.0

    def start(self, title: str, total: int) -> None:
        """Begin a new count of ``total`` steps."""
        self.stop()
        self._title, self._total, self._done = title, total, 0
        self._started = self._last_line = monotonic()
        if self.shown and sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, transient=True)
            self._task = self._bar.add_task(title, total=total, note="")
            self._bar.start()

    def advance(self, note: str = "") -> None:
        """One step is done; ``note`` is shown beside the count."""
        self._done += 1
        now = monotonic()
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=note)
        elif self.shown and now - self._last_line >= LINE_EVERY and self._done < self._total:
            self._last_line = now
            pace = (now - self._started) / self._done
            self.log(f"{self._title}: step {self._done} of {self._total}, {note}, {pace:.2f} s a step")

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
