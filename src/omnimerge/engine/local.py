"""Carry out a plan on the threads of this process, several slices at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor

from omnimerge.checkpoint import CheckpointWriter
from omnimerge.checkpoint.dtypes import item_size
from omnimerge.engine.executor import Report, Task, tasks_left
from omnimerge.engine.inputs import InputFiles
from omnimerge.engine.knowledge import model_statistics
from omnimerge.engine.plan import CHUNK_ELEMENTS, MergePlan, TensorJob, worker_count
from omnimerge.engine.slices import SliceWorker
from omnimerge.engine.threads import one_thread, thread_pool

MEMORY = 10**9
"""Default of `LocalExecutor`: bytes for the buffers of all threads."""


# A tensor of more than this part of the output is large.
_LARGE = 32


class LocalExecutor:
    """Threads of this process. See `Executor`.

    Args:
        memory: bytes for the buffers of all threads together. A method that takes whole matrices
            gets those that are larger one at a time.
    """

    hashes = False
    devices: Mapping[str, str] = MappingProxyType({})

    def __init__(self, memory: int = MEMORY) -> None:
        self._memory = memory

    def run(
        self,
        plan: MergePlan,
        files: InputFiles,  # noqa: ARG002 this process opened them
        writer: CheckpointWriter,
        report: Report,
    ) -> None:
        """Write everything that the writer does not have yet; see `Executor`.

        Args:
            plan: what to do.
            files: its inputs.
            writer: the output.
            report: gets the bytes written.
        """
        with one_thread():
            todo = Todo(plan, writer, self._memory)
            statistics = model_statistics(plan, memory=self._memory) if todo.anything else None

            def work() -> None:
                worker = SliceWorker(plan, statistics)
                for task in todo:
                    todo.write(worker, task, report)

            todo.do([work] * worker_count())

    def close(self) -> None:
        """Nothing is held."""


class Room:
    """Memory that threads share.

    Args:
        limit: bytes.
        ended: set when nobody needs to wait any more.
    """

    def __init__(self, limit: int, ended: threading.Event) -> None:
        self.limit, self._used = limit, 0
        self._ended = ended
        self._freed = threading.Condition()

    @contextmanager
    def taken(self, cost: int) -> Iterator[None]:
        """Wait until so many bytes are free, and hold them; who never fits, or all, is alone.

        Args:
            cost: bytes.
        """
        with self._freed:
            while self._used and self._used + cost > self.limit and not self._ended.is_set():
                self._freed.wait(timeout=1.0)
            self._used += cost
        try:
            yield
        finally:
            with self._freed:
                self._used -= cost
                self._freed.notify_all()


class Todo:
    """What is left to do, shared by the threads; each iterates over it.

    Args:
        plan: what to do.
        writer: the output.
        memory: bytes for the buffers of the threads that compute on the CPU.
        elements: of a slice, about.
    """

    def __init__(
        self,
        plan: MergePlan,
        writer: CheckpointWriter,
        memory: int,
        elements: int = CHUNK_ELEMENTS,
    ) -> None:
        self._plan, self._writer = plan, writer
        self._tasks = _largest_first(plan, writer, elements)
        self._lock = threading.Lock()
        self.anything = writer.resumed < plan.bytes_to_write
        self.ended = threading.Event()
        self._room = Room(memory, self.ended)

    def __iter__(self) -> Iterator[Task]:
        """Give tasks until there is none, or the end is asked for."""
        while not self.ended.is_set():
            with self._lock:
                task = next(self._tasks, None)
            if task is None:
                return
            yield task

    def write(self, worker: SliceWorker, task: Task, report: Report) -> None:
        """Compute a task on the CPU, and write it.

        Args:
            worker: of this thread.
            task: what to do.
            report: gets the bytes written.
        """
        job = task.job
        cost = self._plan.memory_of(job)
        with self._room.taken(cost):
            for start, stop in task.slices:
                if self.ended.is_set():
                    return
                data = worker.compute(job, start, stop).view(torch.uint8)
                self.put(job, start * item_size(job.output.dtype), data, report)
            if cost * worker_count() > self._room.limit:  # not all threads may keep as much
                worker.forget()

    def put(self, job: TensorJob, place: int, data: Tensor, report: Report) -> None:
        """Write bytes of a tensor.

        Args:
            job: the tensor.
            place: of the first byte within it.
            data: the bytes.
            report: gets their number.
        """
        self._writer.write(job.output.name, data.numpy().data, place)
        report(data.numel())

    def do(self, works: Sequence[Callable[[], None]]) -> None:
        """Run functions in threads, to the end of them all.

        Args:
            works: each iterates over this; what one raises ends the others.
        """

        def guarded(work: Callable[[], None]) -> None:
            try:
                work()
            except BaseException:
                self.ended.set()
                raise

        with thread_pool(len(works)) as pool:
            futures = [pool.submit(guarded, work) for work in works]
            try:
                for future in futures:
                    future.result()
            except BaseException:  # KeyboardInterrupt too: let the workers end
                self.ended.set()
                raise


def _largest_first(plan: MergePlan, writer: CheckpointWriter, elements: int) -> Iterator[Task]:
    """Give tasks in file order; of whole tensors, large ones first: the last keeps one thread."""
    whole = plan.method.statistics is not None
    for large in (True, False) if whole else (False,):
        for task in tasks_left(plan, writer, elements):
            if (whole and task.job.output.nbytes * _LARGE > plan.bytes_to_write) == large:
                yield task
