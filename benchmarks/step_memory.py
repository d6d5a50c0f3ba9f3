"""Peak memory of training steps, each network in a fresh process of its own (Linux)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.child import in_fresh_process, named

STEPS = 2
PROCESSES = 3  # a claim about memory needs more than one


def peak_memories(arms: Mapping[str, tuple[Any, ...]], processes: int, threads: int) -> dict[str, list[int]]:
    """Bytes by which the peak resident memory of a process grows while it builds a network and takes two steps.

    One process says little: what the allocator keeps between two steps moves with the machine. The arms take turns.

    Args:
        arms: name -> ``"module:function"`` and its arguments; the function returns one training step, as a call.
        processes: of each arm.
        threads: of torch in each process.

    Returns:
        One figure a process; none on systems that cannot reset the peak (all but Linux).

    Raises:
        RuntimeError: a process died, most likely because memory ran out.
    """
    found: dict[str, list[int]] = {arm: [] for arm in arms}
    if not Path("/proc/self/clear_refs").exists():
        return found
    for _ in range(processes):
        for arm, (builder, *arguments) in arms.items():
            found[arm].append(int(in_fresh_process(_measure, threads, builder, arguments)))
    return found


def memory_figures(samples: Sequence[int]) -> dict[str, Any]:
    """JSON of one arm's processes: the median, None where nothing was measured, and each."""
    return {
        "peak_memory_bytes": int(statistics.median(samples)) if samples else None,
        "peak_memory_of_processes_bytes": list(samples),
    }


def _measure(threads: int, builder: str, arguments: Sequence[Any]) -> int:
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    build = named(builder)
    # libraries load their kernels in a first step; that memory is no network's
    small = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.GroupNorm(8, 8), nn.Flatten(2), nn.Linear(512, 8))
    small(torch.randn(1, 1, 8, 8, 8)).sum().backward()

    def steps() -> None:
        step = build(*arguments)
        for _ in range(STEPS):
            step()

    return peak_growth(steps)


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the peak resident memory of this process grows during a call.

    Raises:
        OSError: this system cannot reset the peak (only Linux can).
    """
    before = _status_bytes("VmRSS")
    with open("/proc/self/clear_refs", "w", encoding="ascii") as handle:
        handle.write("5")  # resets the peak, VmHWM (man 5 proc)
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as handle:
        for line in handle:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
