"""Peak memory of training steps, each network in a fresh process of its own (Linux)."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STEPS = 2


def peak_memory(builder: str, *arguments: Any, threads: int) -> int | None:
    """Bytes by which the peak resident memory of a process grows while it builds a network and takes two steps.

    Args:
        builder: ``"module:function"``; the function gets ``arguments`` and returns one training step, as a call.

    Returns:
        None on systems that cannot reset the peak (all but Linux).

    Raises:
        RuntimeError: the process died, most likely because memory ran out.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(send, threads, builder, arguments))
    process.start()
    send.close()
    try:
        return int(receive.recv())
    except EOFError:
        process.join()
        raise RuntimeError(f"{builder}{arguments} ended with exit code {process.exitcode}; see its message") from None
    finally:
        process.join()


def _measure(send: Connection, threads: int, builder: str, arguments: tuple[Any, ...]) -> None:
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    module, _, function = builder.partition(":")
    build: Callable[..., Callable[[], object]] = getattr(importlib.import_module(module), function)
    # libraries load their kernels in a first step; that memory is no network's
    small = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.GroupNorm(8, 8), nn.Flatten(2), nn.Linear(512, 8))
    small(torch.randn(1, 1, 8, 8, 8)).sum().backward()
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak, VmHWM (man 5 proc)
    step = build(*arguments)
    for _ in range(STEPS):
        step()
    send.send(_status_bytes("VmHWM") - before)
    send.close()


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
