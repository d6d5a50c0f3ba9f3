"""Timing of stock prediction, end to end, as a sub-process; shared by the benchmarks that time it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.equal_time import Bench
from benchmarks.timing import Sample

PR_SET_CHILD_SUBREAPER = 36


def child_cpu_s() -> float:
    """CPU seconds of all ended sub-processes and of what they waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def orphans_counted() -> Iterator[None]:
    """Wait at the end for what the commands started inside leave behind (Linux): a fork server ends after the command
    that started it, and neither its CPU seconds nor those of its workers would count. Other children are left alone."""
    if sys.platform != "linux":
        yield
        return
    known, prctl = children(), ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
        while left := children() - known:
            for process in left:
                os.waitpid(process, 0)
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def children() -> set[int]:
    """Process ids of the children of this process, ended or not."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(process) for task in tasks for process in task.read_text(encoding="ascii").split()}


def arguments_of(bench: Bench, trainer: str, plans: str, images: Path, output: Path, workers: int) -> list[str]:
    """Arguments of ``nnUNetv2_predict``, without mirroring, for what a bench stands for.

    Args:
        workers: processes for preprocessing, and as many for export; 0 for both: all in one process.
    """
    words = ["-d", str(int(bench.dataset[7:10])), "-c", bench.configuration, "-f", str(bench.fold)]
    words += ["-tr", trainer, "-p", plans, "-i", str(images), "-o", str(output)]
    words += ["-device", bench.options.device, "--disable_tta", "--disable_progress_bar"]
    return [*words, "-npp", str(workers), "-nps", str(workers)]


def timed_command(bench: Bench, program: Sequence[str], words: Sequence[str], folder: Path) -> Sample:
    """Run a prediction in an empty output folder; returns its wall and CPU seconds.

    Args:
        program: ``["nnUNetv2_predict"]``, or another command that takes its arguments.
        words: of :func:`arguments_of`.
        folder: of the run: models below it, the log in it.

    Raises:
        RuntimeError: a prediction is missing: that is no timing.
    """
    images, output = (Path(words[words.index(flag) + 1]) for flag in ("-i", "-o"))
    shutil.rmtree(output, ignore_errors=True)
    first = [str(Path(sys.executable).parent / program[0])] if len(program) == 1 else list(program)
    cpu, started = child_cpu_s(), time.perf_counter()
    with orphans_counted():
        bench.call([*first, *words], folder)
        wall = time.perf_counter() - started
    sample = Sample(wall=wall, cpu=child_cpu_s() - cpu)
    found, expected = len(list(output.glob("*.nii.gz"))), len(list(images.iterdir()))
    if found != expected:
        raise RuntimeError(f"nnUNetv2_predict wrote {found} of {expected} files to {output}; see {folder}/log.txt")
    return sample
