"""The processes that judge files of ``umit import``: one that dies costs its file, and none outlives its parent."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import corpus
import pytest
from corpus import body, make_good, save, start

from nnunet_umit.importing import run, workers
from nnunet_umit.importing.verdict import Kind


def test_a_killed_process_costs_its_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_good(tmp_path / "scans", 10)
    killer = save(tmp_path / "scans" / "good killer.nii.gz", body(99))
    monkeypatch.setattr(run, "judge", corpus.judge_or_die)
    outcome = start(tmp_path / "scans", tmp_path / "raw", jobs=2)
    assert [(each.path, each.kind) for each in outcome.rejections] == [(str(killer), Kind.CRASH)]
    assert len(outcome.cases) == 10 and outcome.exit_code == 1
    assert "killed the process" in outcome.rejections[0].reason


def test_no_process_outlives_a_killed_parent(tmp_path: Path) -> None:
    """The worker holds a lock until it ends, and would wait for ever."""
    lock, pipe = tmp_path / "lock", tmp_path / "pipe"
    os.mkfifo(pipe)
    code = f"""
import sys
sys.path.insert(0, {str(Path(corpus.__file__).parent)!r})
import corpus
from nnunet_umit.importing import workers
if __name__ == "__main__":
    list(workers.each(corpus.hold_for_ever, [({str(lock)!r}, {str(pipe)!r})], 1, corpus.do_nothing))
"""
    (tmp_path / "main.py").write_text(code)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env={**os.environ, "PYTHONPATH": ""})
    assert pipe.read_text() == "held"  # blocks until the worker has the lock
    parent.kill()
    parent.wait()
    with lock.open() as handle:
        free = threading.Thread(target=fcntl.flock, args=(handle, fcntl.LOCK_EX), daemon=True)
        free.start()
        free.join(timeout=60)
        assert not free.is_alive(), "the worker is still there"


def test_processes_that_never_start_blame_no_file() -> None:
    with pytest.raises(workers.WorkersError, match="--jobs 0"):
        list(workers.each(corpus.identity, [1, 2], 1, corpus.die))


def test_items_are_taken_a_few_at_a_time() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(40):
            taken.append(item)
            yield item

    results = workers.each(corpus.identity, items(), 1, corpus.do_nothing)
    first = next(results)
    assert first.result == first.item and len(taken) <= 8
    assert sorted([first.item, *(done.result for done in results)]) == list(range(40))
