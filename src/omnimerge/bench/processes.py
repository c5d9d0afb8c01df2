"""Processes that train: workers that end with their parent, and one build or run of a folder."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path

from omnimerge.bench.line import BenchError

_LOCK_NAME = ".lock"


@contextmanager
def trainers() -> Iterator[ProcessPoolExecutor]:
    """Start up to two processes of one thread each, so that sums are always in one order.

    They end with this process, however it ends, and at once where the block is left by an error or
    an interruption.

    Yields:
        The pool.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(2, cores()), mp_context=context, initializer=_begin)
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def cores() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder of a benchmark, so that no second build or run writes into it.

    Args:
        folder: of one seed; exists.

    Yields:
        Nothing.

    Raises:
        BenchError: if another process holds it.
    """
    lock = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            busy = error.errno in (errno.EAGAIN, errno.EACCES)
            reason = "another build or run is writing into it" if busy else error.strerror
            raise BenchError(
                f"cannot lock {folder}: {reason}; wait for it or give another folder"
            ) from error
        yield
    finally:
        os.close(lock)


def _begin() -> None:
    """Set up a worker: it ends with its parent, has one thread, and shows no progress bars."""
    import torch
    from transformers.utils import logging

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(1)
    logging.disable_progress_bar()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
