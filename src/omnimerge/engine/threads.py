"""Threads of a merge: several at a time, each of which computes alone.

Sums and decompositions by several threads differ in the last bits from those by one, and how many
there are depends on the machine and its load: with one, the bytes are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from omnimerge.engine.plan import worker_count


@contextmanager
def thread_pool(count: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Make the threads of a merge, and wait for their end, whatever happens.

    Args:
        count: how many; default: `worker_count`.

    Yields:
        A pool whose threads compute alone; OpenMP's setting is one of each thread. What it has not
        begun when the block ends is not done.
    """
    pool = ThreadPoolExecutor(
        count or worker_count(), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        _end(pool)


def _end(pool: ThreadPoolExecutor) -> None:
    """Wait for the threads, also after a second Ctrl-C: they write into what is tidied up next."""
    interrupted = None
    while True:
        try:
            pool.shutdown(cancel_futures=True)
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
