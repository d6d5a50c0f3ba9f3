"""Several processes: which device is mine, and a wrapper that also works on CPUs and on several machines.

nnU-Net's distributed training starts its own processes, one for each GPU of one machine. Under ``torchrun`` (see
``umit train``) processes may also be CPUs (gloo), or sit on other machines, where the number of a process is not the
number of its GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


def own_device(requested: torch.device) -> torch.device:
    """The device of this process: its GPU on its machine (``LOCAL_RANK``), or the CPU where that was asked for."""
    if requested.type != "cuda":
        return requested
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", distributed.get_rank())))


def ranks_here() -> int:
    """Processes of this training on this machine: what ``torchrun`` says, or all, as nnU-Net starts them."""
    everywhere = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", everywhere)) if everywhere > 1 else 1


def wrap(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Average gradients over all processes."""
    return DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)


@contextmanager
def wrapping_on(device: torch.device) -> Iterator[None]:
    """While nnU-Net sets up a trainer, its wrapper is ours: its own takes the rank for the number of a GPU."""

    def place(network: nn.Module, device_ids: Any = None) -> DistributedDataParallel:
        return wrap(network, device)

    original = stock.DDP
    stock.DDP = place
    try:
        yield
    finally:
        stock.DDP = original
