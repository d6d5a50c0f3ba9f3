"""Two settings that a training on a CPU needs, and that torch leaves to environment variables."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_M_TRIM_THRESHOLD = -1  # <malloc.h>
_M_MMAP_MAX = -4


def use_own_cores(ranks: int = 1) -> None:
    """No more torch threads than cores this process may use: nnU-Net starts one for every core of the machine.

    Args:
        ranks: processes of the training on this machine, which share the cores.
    """
    if hasattr(os, "sched_getaffinity"):  # Linux
        torch.set_num_threads(max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // ranks)))


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for the next tensor instead of giving it back to the system.

    Every large tensor is otherwise mapped anew, page by page: a fifth to a quarter of a step of the hippocampus plan,
    more on virtual machines. The price is that the process stays at its peak size. Only glibc is asked; jemalloc,
    tcmalloc, macOS and Windows do this by themselves or cannot be asked.

    Returns:
        Whether the setting was made.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
