"""Peak memory of a real fine-tuning step of a plan on the CPU, to hold the planner's memory model against (Linux)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.child import in_fresh_process
from benchmarks.step_memory import peak_growth

_M_MMAP_THRESHOLD = -3  # malloc.h


def measure_training_memory(
    arch_kwargs: Mapping[str, Any], patch_size: Sequence[int], input_channels: int, num_classes: int, batch_size: int
) -> int:
    """Bytes by which the peak resident memory of a fresh process grows while it builds the network and takes two steps.

    fp32, one thread, random data, AdamW, the trainer's loss (Dice, cross-entropy, balanced cross-entropy).

    Raises:
        RuntimeError: the process died, most likely because memory ran out.
        OSError: this system cannot reset the peak (only Linux can).
    """
    return int(
        in_fresh_process(_training_steps, dict(arch_kwargs), tuple(patch_size), input_channels, num_classes, batch_size)
    )


def _training_steps(
    arch_kwargs: dict[str, Any], patch: tuple[int, ...], channels: int, classes: int, batch: int
) -> int:
    import numpy as np
    import torch
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    from nnunet_umit.architectures.unetr import UMITSegmenter
    from nnunet_umit.trainers.balance import balanced_cross_entropy

    torch.set_num_threads(1)
    # glibc keeps freed blocks of up to 32 MB for itself and fragments them; that is not what is asked.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)

    def steps(patch: tuple[int, ...], **kwargs: Any) -> None:
        network = UMITSegmenter(channels, classes, deep_supervision=True, **kwargs).train()
        optimiser = torch.optim.AdamW(network.parameters())
        weights = np.array([0.5**level for level in range(len(kwargs["strides"]) - 1)])
        dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
        loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
        stock, balanced = (
            DeepSupervisionWrapper(each, weights / weights.sum()) for each in (loss, balanced_cross_entropy)
        )
        for _ in range(2):
            optimiser.zero_grad(set_to_none=True)
            logits = network(torch.randn(batch, channels, *patch))
            targets = [torch.randint(0, classes, (batch, 1, *level.shape[2:])).float() for level in logits]
            (stock(logits, targets) + balanced(logits, targets)).backward()
            optimiser.step()

    token = [arch_kwargs["token_size"]] * len(patch)
    small = {**arch_kwargs, "embed_dim": 48, "depth": 1, "num_heads": 3}
    steps(tuple(token), **small)  # libraries load their kernels in the first step; that memory is not the network's
    return peak_growth(lambda: steps(patch, **arch_kwargs))
