"""A function over many items in processes that may die: a death costs the item that caused it, and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 4  # items handed out for each process, so that none waits; bounds what is in flight


class WorkersError(RuntimeError):
    """Worker processes do not even start, so no item is to blame."""


@dataclass(frozen=True)
class Done(Generic[Item, Result]):
    """An item with its result; None when the process that worked on it, alone, died."""

    item: Item
    result: Result | None


def each(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    jobs: int,
    prepare: Callable[[], None],
) -> Generator[Done[Item, Result], None, None]:
    """Results in the order they come.

    When a process dies (killed for memory, crashed in a reader), the items in flight are worked on again, one by one;
    one that is alone with its process when that dies is the culprit.

    Args:
        function: Importable by name, like `prepare`: processes are spawned, not forked.
        items: Taken a few at a time.
        jobs: Number of processes; 0 works in this one, without that protection.
        prepare: Called once in each process.

    Raises:
        WorkersError: When processes die without work as well.
        Exception: Whatever `function` raises.
    """
    if jobs == 0:
        for item in items:
            yield Done(item, function(item))
        return
    source = iter(items)
    while True:
        suspects = yield from _together(function, source, jobs, prepare)
        if not suspects:
            return
        yield from _alone(function, suspects, prepare)


def _together(
    function: Callable[[Item], Result], source: Iterator[Item], jobs: int, prepare: Callable[[], None]
) -> Generator[Done[Item, Result], None, list[Item]]:
    """Work until `source` is empty or a process dies; returns the items in flight at that moment."""
    pool = _pool(jobs, prepare)
    running: dict[Future[Result], Item] = {}
    try:
        while True:
            for item in islice(source, _AHEAD * jobs - len(running)):
                try:
                    running[pool.submit(function, item)] = item
                except BrokenProcessPool:
                    return [*running.values(), item]
            if not running:
                return []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                try:
                    result = future.result()
                except BrokenProcessPool:
                    return list(running.values())
                yield Done(running.pop(future), result)
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(
    function: Callable[[Item], Result], suspects: Iterable[Item], prepare: Callable[[], None]
) -> Iterator[Done[Item, Result]]:
    """Work on one item at a time, in a process that has shown to be alive."""
    pool: ProcessPoolExecutor | None = None
    try:
        for item in suspects:
            if pool is None:
                pool = _pool(1, prepare)
                try:
                    pool.submit(_nothing).result()
                except BrokenProcessPool as error:
                    reason = "worker processes die before they have work; try --jobs 0, which works without them"
                    raise WorkersError(reason) from error
            try:
                yield Done(item, pool.submit(function, item).result())
            except BrokenProcessPool:
                pool.shutdown()
                pool = None
                yield Done(item, None)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _pool(jobs: int, prepare: Callable[[], None]) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")  # fork copies locks of threads that do not exist in the child
    return ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_begin, initargs=(prepare,))


def _begin(prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it lets running items end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare()


def _end_with_parent() -> None:
    """A killed parent ends this process too: it would work on what is queued, and then wait for more for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _nothing() -> None:
    """The smallest possible piece of work."""
