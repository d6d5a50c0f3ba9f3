"""Batches as a pure function of (seed, stream, index).

nnU-Net's loaders draw from random generators that live in worker processes, so a batch depends on how many workers
there are, which of them was quicker, and how often a training was restarted. Here batch number ``i`` is made by seeding
all generators from ``(seed, stream, i)`` to draw which samples it holds, and from ``(seed, stream, i, j)`` to make
sample ``j``. The same index gives the same batch in every process, with any number of workers; a resumed training
starts at index ``epoch * iterations_per_epoch`` and needs no generator state; validation asks for the same indices in
every epoch.

The ranks of a distributed training share out the samples of one batch between them, so together they see what a single
process would see, and no sample twice.
"""

from __future__ import annotations

import os
import random
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

PREFETCH = 3  # batches that each worker makes ahead
_SHARED_MEMORY = Path("/dev/shm")


def derive_seed(seed: int, stream: str, *indices: int) -> int:
    """A 64-bit seed that depends on every argument, well mixed (numpy ``SeedSequence``).

    Args:
        seed: the seed of the plan.
        stream: what the numbers are for, such as ``"train"`` or ``"mask"``; streams are independent.
        indices: non-negative positions within the stream, such as rank and iteration.
    """
    entropy = [seed, zlib.crc32(stream.encode()), len(indices), *indices]  # the length: trailing zeros do not count
    words = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))  # torch takes signed 64-bit seeds


def seed_generators(seed: int) -> None:
    """Seed Python, numpy and torch (CPU)."""
    random.seed(seed)
    np.random.seed(np.random.SeedSequence(seed).generate_state(4))
    torch.default_generator.manual_seed(seed)


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch (CPU), use one torch thread, and put everything back afterwards.

    One thread: sums over several threads may round differently, and workers have only one.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state(), torch.get_num_threads()
    try:
        seed_generators(seed)
        torch.set_num_threads(1)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
        torch.set_num_threads(states[3])


class Samples(Protocol):
    """Where batches come from; must carry no state of its own."""

    def draw(self) -> Sequence[Any]:
        """Which samples a whole batch holds, over all ranks, from numpy's present state."""

    def drawn(self, requests: Sequence[Any]) -> bool:
        """Whether labels of these samples will be drawn by the shares of the classes in a voxel."""

    def make(self, request: Any, position: int) -> tuple[torch.Tensor, Any, str, str]:
        """One sample: image (C, *patch), target (or targets), name of the case, and the group it is logged with."""


class IndexedBatches(Dataset):
    """A map from an index to a batch, or to a rank's share of it.

    Args:
        samples: draws and makes samples from the present state of the generators.
        seed: the seed of the plan.
        stream: ``"train"`` or ``"validation"``.
        rank, ranks: position in a distributed training and its size.
    """

    def __init__(self, samples: Samples, *, seed: int, stream: str, rank: int = 0, ranks: int = 1) -> None:
        self.samples = samples
        self.seed = seed
        self.stream = stream
        self.rank = rank
        self.ranks = ranks

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The batch: ``data`` (B, C, *patch), ``target``, ``keys`` (cases), ``groups``, ``positions``, ``index``; and
        ``drawn``, the same on all ranks: whether labels were drawn by the shares of the classes in a voxel."""
        seed = derive_seed(self.seed, self.stream, index)
        made, positions = [], []
        with random_state(seed):
            requests = self.samples.draw()
            for position in range(self.rank, len(requests), self.ranks):
                seed_generators(derive_seed(seed, "sample", position))
                try:
                    made.append(self.samples.make(requests[position], position))
                except Exception as error:
                    raise RuntimeError(
                        f"batch {index} of the {self.stream} data could not be made, because of case "
                        f"{requests[position]}: {type(error).__name__}: {error}"
                    ) from error
                positions.append(position)
        images, targets, keys, groups = zip(*made, strict=True)
        return {
            "data": torch.stack(images),
            "target": _stack(targets),
            "keys": list(keys),
            "groups": list(groups),
            "positions": positions,
            "index": index,
            "drawn": self.samples.drawn(requests),
        }


def _stack(targets: Sequence[Any]) -> Any:
    """Targets of several samples, each a tensor or a list of tensors of falling resolution."""
    if isinstance(targets[0], list):
        return [torch.stack(level) for level in zip(*targets, strict=True)]
    return torch.stack(list(targets))


class IndexSequence(Sampler[int]):
    """``start, start + 1, ...`` up to ``stop`` (or for ever), each taken modulo ``period``."""

    def __init__(self, start: int = 0, stop: int | None = None, period: int | None = None) -> None:
        self.start = start
        self.stop = stop
        self.period = period

    def __iter__(self) -> Iterator[int]:
        index = self.start
        while self.stop is None or index < self.stop:
            yield index if self.period is None else index % self.period
            index += 1


class BatchStream:
    """``next(stream)`` gives the batches of an ``IndexSequence`` in order, made ahead by worker processes.

    Workers start at the first ``next``, so that a stream that is never read costs nothing.

    Args:
        batches: the map from index to batch.
        indices: which indices, in which order.
        workers: processes; 0 makes the batches in this process. The batches are the same.
        prefetch: batches that each worker makes ahead.
        pin_memory: page-locked batches, for quick copies to a GPU.
    """

    def __init__(
        self,
        batches: IndexedBatches,
        indices: IndexSequence,
        *,
        workers: int = 0,
        prefetch: int = PREFETCH,
        pin_memory: bool = False,
    ) -> None:
        self.batches = batches
        self.indices = indices
        self.workers = workers
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self._iterator: Iterator[dict[str, Any]] | None = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch.

        Raises:
            RuntimeError: a worker failed (its traceback is in the message) or was killed.
        """
        if self._iterator is None:
            self._iterator = iter(self._loader())
        try:
            return next(self._iterator)
        except RuntimeError as error:
            self.close()
            if loader_died(error):
                raise explain_death(self.workers) from error
            raise

    def _loader(self) -> DataLoader:
        parallel: dict[str, Any] = {"prefetch_factor": self.prefetch} if self.workers else {}
        return DataLoader(
            self.batches,
            batch_size=None,
            sampler=self.indices,
            num_workers=self.workers,
            collate_fn=_unchanged,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # else the loader draws from the global generator
            **parallel,
        )

    def close(self) -> None:
        """Stop the workers."""
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        self._iterator = None
        if shutdown is not None:
            shutdown()


def loader_died(error: BaseException) -> bool:
    """Whether torch tells with an error that a loader process is dead: where the main process waits for a batch, or by
    a signal, wherever it happens to be."""
    text = str(error)
    return "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text)


def explain_death(workers: int) -> RuntimeError:
    """What a user can do about it."""
    return RuntimeError(
        "a process that prepares batches was killed, most often because the memory ran out; set nnUNet_n_proc_DA below "
        f"{workers} (0: no extra process) and continue with --c"
    )


def _unchanged(batch: Any) -> Any:
    return batch


def workers_for_shared_memory(
    wanted: int, *, batch_bytes: int, prefetch: int, ranks: int = 1, folder: Path = _SHARED_MEMORY
) -> int:
    """How many workers fit, when batches travel through shared memory that may be tiny (64 MB in a container).

    Args:
        wanted: number of workers asked for.
        batch_bytes: size of one batch.
        prefetch: batches that each worker makes ahead.
        ranks: processes that train on this machine, each with workers of its own.
        folder: where the shared memory is mounted; no such folder means no such limit.

    Returns:
        ``wanted``, or as many as leave room for all batches in flight.
    """
    if os.name != "posix" or not folder.is_dir():
        return wanted
    room = int(shutil.disk_usage(folder).free * 0.8 / ranks) // max(batch_bytes, 1) - 2
    return max(0, min(wanted, room // max(prefetch, 1)))
