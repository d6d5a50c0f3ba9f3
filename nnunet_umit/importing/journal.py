"""Verdicts on disk while an import runs, one JSON line each: an interrupted import goes on instead of starting anew."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from nnunet_umit.files import replace
from nnunet_umit.importing.verdict import Candidate, OutputError, Verdict


class Journal:
    """Known verdicts, and a place for new ones.

    Args:
        path: The file.
        conditions: What verdicts depend on besides the files (version, limits). Verdicts found under other
            conditions, or after a line that was cut off, are forgotten.
    """

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        self.path, self.conditions = path, conditions
        self._known = {(verdict.relative, verdict.state): verdict for verdict in self._read()}
        self._handle: TextIO | None = None

    def __enter__(self) -> Journal:
        """Write the file anew with what is known, whole lines only, and keep it open."""
        fresh = self.path.with_name(self.path.name + ".new")
        with fresh.open("w", encoding="ascii") as handle:
            handle.write(json.dumps(self.conditions) + "\n")
            handle.writelines(json.dumps(verdict.to_dict()) + "\n" for verdict in self._known.values())
        replace(fresh, self.path)
        self._handle = self.path.open("a", encoding="ascii")
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.close()

    def find(self, candidate: Candidate) -> Verdict | None:
        """The verdict on a file that has not changed since."""
        return self._known.get((candidate.relative, candidate.state))

    def add(self, verdict: Verdict) -> None:
        """Remember a verdict, whatever happens next.

        Raises:
            OutputError: When the disk is full.
        """
        if self._handle is None:
            raise RuntimeError("a journal takes verdicts only inside its with block")
        try:
            self._handle.write(json.dumps(verdict.to_dict()) + "\n")
            self._handle.flush()
        except OSError as error:
            raise OutputError(f"cannot write {self.path} ({error.strerror})") from error

    def _read(self) -> list[Verdict]:
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="ascii", errors="replace").splitlines()
        verdicts: list[Verdict] = []
        try:
            if not lines or json.loads(lines[0]) != self.conditions:
                return []
            for line in lines[1:]:
                verdicts.append(Verdict.from_dict(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            return verdicts  # a kill in the middle of a line: what stands before it holds
        return verdicts
