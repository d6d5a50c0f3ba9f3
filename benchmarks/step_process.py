"""Training steps of a network that needs other versions of libraries, in a process of its own while they are timed."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

from benchmarks.child import Child, named
from benchmarks.timing import Sample, timed


class StepProcess:
    """A training step in another process. Called, it takes one; :meth:`timed` also returns the seconds it took there.

    Args:
        builder: ``"module:function"``; the function gets ``arguments`` and returns a network and its training step.

    Raises:
        RuntimeError: the process died; its own message is above.
    """

    def __init__(self, builder: str, *arguments: Any, threads: int, keep_freed_memory: bool = False) -> None:
        self._child = Child(_serve, builder, arguments, threads, keep_freed_memory)
        self.parameters = int(self._child.receive())

    def __call__(self) -> None:
        self.timed()

    def timed(self) -> Sample:
        """Take a step; its wall and CPU seconds, as the other process saw them."""
        self._child.connection.send("step")
        return Sample(*self._child.receive())

    def close(self) -> None:
        """End the process."""
        self._child.close()


def _serve(connection: Connection, builder: str, arguments: tuple[Any, ...], threads: int, kept: bool) -> None:
    import torch

    from nnunet_umit.trainers.cpu import keep_freed_memory

    torch.set_num_threads(threads)
    if kept:
        keep_freed_memory()
    network, step = named(builder)(*arguments)
    connection.send(sum(parameter.numel() for parameter in network.parameters()))
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        sample = timed(step)
        connection.send((sample.wall, sample.cpu))
