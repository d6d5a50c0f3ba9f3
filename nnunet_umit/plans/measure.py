"""Peak memory of real training steps on the CPU, to hold the memory model against (Linux).

``python -m nnunet_umit.plans.measure PLANS.json [-c 3d_fullres] [-b BATCH]`` prints prediction and measurement.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from nnunet_umit.plans.memory import GB, predict_training_memory

_M_MMAP_THRESHOLD = -3  # malloc.h


def measure_training_memory(
    arch_kwargs: Mapping[str, Any], patch_size: Sequence[int], input_channels: int, num_classes: int, batch_size: int
) -> int:
    """Bytes by which the peak resident memory of a fresh process grows while it builds the network and takes two steps.

    fp32, one thread, random data, AdamW, nnU-Net's own deep-supervision loss (Dice + cross-entropy).

    Raises:
        RuntimeError: the process died, most likely because memory ran out.
        OSError: this system cannot reset the peak (only Linux can).
    """
    return in_fresh_process(
        _training_steps, dict(arch_kwargs), tuple(patch_size), input_channels, num_classes, batch_size
    )


def in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    """What a function of a module returns in a new process.

    Raises:
        RuntimeError: the process died, most likely because memory ran out.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(send, function, arguments))
    process.start()
    send.close()
    try:
        return int(receive.recv())
    except EOFError:
        process.join()
        raise RuntimeError(f"the measuring process ended with exit code {process.exitcode}; see its message") from None
    finally:
        process.join()


def _answer(send: Connection, function: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    send.send(function(*arguments))
    send.close()


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


def _training_steps(
    arch_kwargs: dict[str, Any], patch: tuple[int, ...], channels: int, classes: int, batch: int
) -> int:
    import numpy as np
    import torch
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    from nnunet_umit.architectures.unetr import UMITSegmenter

    torch.set_num_threads(1)
    # glibc keeps freed blocks of up to 32 MB for itself and fragments them: up to 40 % more, and not what is asked.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)

    def steps(patch: tuple[int, ...], **kwargs: Any) -> None:
        network = UMITSegmenter(channels, classes, deep_supervision=True, **kwargs).train()
        optimiser = torch.optim.AdamW(network.parameters())
        weights = np.array([0.5**level for level in range(len(kwargs["strides"]) - 1)])
        dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
        loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
        supervise = DeepSupervisionWrapper(loss, weights / weights.sum())
        for _ in range(2):
            optimiser.zero_grad(set_to_none=True)
            logits = network(torch.randn(batch, channels, *patch))
            targets = [torch.randint(0, classes, (batch, 1, *level.shape[2:])).float() for level in logits]
            supervise(logits, targets).backward()
            optimiser.step()

    token = [arch_kwargs["token_size"]] * len(patch)
    small = {**arch_kwargs, "embed_dim": 48, "depth": 1, "num_heads": 3}
    steps(tuple(token), **small)  # libraries load their kernels in the first step; that memory is not the network's
    return peak_growth(lambda: steps(patch, **arch_kwargs))


def _status_bytes(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as handle:
        for line in handle:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def main() -> None:
    """Print predicted and measured memory for the configurations of a plans file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("plans", help="UMITPlans.json, beside its dataset.json in nnUNet_preprocessed")
    parser.add_argument("-c", "--configuration", nargs="*", help="default: all configurations of the plans")
    parser.add_argument("-b", "--batch", type=int, help="default: the batch size of the plans")
    arguments = parser.parse_args()
    from nnunet_umit.plans.report import heads_and_channels

    with open(arguments.plans, encoding="utf-8") as handle:
        plans = json.load(handle)
    classes, channels = heads_and_channels(arguments.plans)
    for name in arguments.configuration or plans["configurations"]:
        configuration = plans["configurations"][name]
        patch, batch = configuration["patch_size"], arguments.batch or configuration["batch_size"]
        arch = configuration["architecture"]["arch_kwargs"]
        predicted = predict_training_memory(arch, patch, channels, classes, "full").total(batch)
        measured = measure_training_memory(arch, patch, channels, classes, batch)
        print(
            f"{plans['dataset_name']} {name} patch {patch} batch {batch} fp32: predicted {predicted / GB:.2f} GB, "
            f"measured {measured / GB:.2f} GB ({predicted / measured:.0%})"
        )


if __name__ == "__main__":
    main()
