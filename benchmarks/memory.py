"""Peak memory of the sub-processes of a benchmark, sampled from /proc (Linux; elsewhere nothing is measured).

RSS counts pages that processes share once for each of them, so its sum over a tree of processes is an upper bound. PSS
divides shared pages among those who share them.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import TracebackType

from benchmarks.common import write_json

_PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")
GB = 1e9


def parents(proc: Path = _PROC) -> dict[int, int]:
    """Parent of every process that exists."""
    found = {}
    for folder in proc.glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended between listing and reading
            continue
        found[int(folder.name)] = int(fields[1])
    return found


def descendants(root: int, parent_of: dict[int, int]) -> list[int]:
    """Processes below ``root``, itself excluded."""
    found, pending = [], [root]
    while pending:
        above = pending.pop()
        children = [pid for pid, parent in parent_of.items() if parent == above and pid != root]
        found += children
        pending += children
    return sorted(found)


def memory_of(pids: list[int], proc: Path = _PROC) -> tuple[int, int]:
    """Bytes of RSS and of PSS, summed; what ended meanwhile counts as nothing."""
    resident = shared = 0
    for pid in pids:
        try:
            resident += int((proc / str(pid) / "statm").read_text(encoding="ascii").split()[1]) * _PAGE
            lines = (proc / str(pid) / "smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        shared += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return resident, shared


class MemoryWatch:
    """Watches the sub-processes of this process while the context is open; the peaks survive a kill.

    Args:
        file: JSON that holds the peaks so far; what an earlier, killed call found there counts too.
        every_s: seconds between two samples.
    """

    def __init__(self, file: Path, every_s: float = 1.0) -> None:
        self.file = file
        self.every_s = every_s
        stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.peak_rss, self.peak_pss = stored.get("rss_bytes", 0), stored.get("pss_bytes", 0)
        self.samples = stored.get("samples", 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def sample(self) -> None:
        """Look once."""
        resident, shared = memory_of(descendants(os.getpid(), parents()))
        if not resident:
            return
        self.samples += 1
        if resident > self.peak_rss or shared > self.peak_pss:
            self.peak_rss, self.peak_pss = max(self.peak_rss, resident), max(self.peak_pss, shared)
            self._store()

    def peaks(self) -> dict[str, float | int | None]:
        """Peak of the sums in GB (10^9 bytes), None where nothing was seen, and how often was looked."""
        rss, pss = (round(peak / GB, 3) if peak else None for peak in (self.peak_rss, self.peak_pss))
        return {"peak_rss_gb": rss, "peak_pss_gb": pss, "samples": self.samples}

    def _store(self) -> None:
        content = {"rss_bytes": self.peak_rss, "pss_bytes": self.peak_pss, "samples": self.samples}
        write_json(self.file, content)

    def _watch(self) -> None:
        while not self._stop.wait(self.every_s):
            self.sample()

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self.samples:
            self._store()
