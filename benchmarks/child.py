"""A fresh process that answers, for what this process would disturb, or whose libraries it must not have."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Child:
    """A process that runs ``target(connection, *arguments)``, and the other end of its connection."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> Any:
        """What the process sends next.

        Raises:
            RuntimeError: it ended instead; its own message is above.
        """
        try:
            return self.connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"the measuring process ended with exit code {self._process.exitcode}; see its message"
            ) from None

    def close(self) -> None:
        """Hang up, and wait for the end."""
        self.connection.close()
        self._process.join()


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a new process.

    Raises:
        RuntimeError: the process died; its own message is above, if memory did not run out.
    """
    child = Child(_answer, function, arguments)
    try:
        return child.receive()
    finally:
        child.close()


def _answer(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    connection.send(function(*arguments))


def named(builder: str) -> Callable[..., Any]:
    """The function ``"module:function"``, which a process can be told by name."""
    module, _, function = builder.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found
