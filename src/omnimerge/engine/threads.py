"""Threads of a merge: several at a time, each of which computes alone.

Sums and decompositions by several threads differ in the last bits from those by one, and how many
there are depends on the machine and its load: with one, the bytes are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch

from omnimerge.engine.plan import worker_count


class _Pool(ThreadPoolExecutor):
    """Knows what it has begun: a `Thread.join` that was interrupted once tells too early."""

    def __init__(self, count: int) -> None:
        super().__init__(count, initializer=torch.set_num_threads, initargs=(1,))
        self._begun: set[Future[Any]] = set()

    def submit(self, /, *arguments: Any, **keywords: Any) -> Future[Any]:
        future = super().submit(*arguments, **keywords)
        self._begun.add(future)
        future.add_done_callback(self._begun.discard)
        return future

    def end(self) -> None:
        """Wait for what is begun; the rest is not done."""
        self.shutdown(wait=False, cancel_futures=True)
        while running := [future for future in tuple(self._begun) if not future.done()]:
            wait(running)
        self.shutdown()


@contextmanager
def thread_pool(count: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Make the threads of a merge, and wait for their end, whatever happens.

    Args:
        count: how many; default: `worker_count`.

    Yields:
        A pool whose threads compute alone; OpenMP's setting is one of each thread. What it has not
        begun when the block ends is not done.
    """
    pool = _Pool(count or worker_count())
    try:
        yield pool
    finally:
        _end(pool)


def _end(pool: _Pool) -> None:
    """Wait for the threads, also after a second Ctrl-C: they write into what is tidied up next."""
    interrupted = None
    while True:
        try:
            pool.end()
        except KeyboardInterrupt as error:
            interrupted = error
            continue
        if interrupted:
            raise interrupted
        return


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute alone in this thread while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
