"""Carry out a plan on the threads of this process, several slices at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from omnimerge.checkpoint import CheckpointWriter
from omnimerge.checkpoint.dtypes import item_size
from omnimerge.engine.executor import Report, Task, tasks_left
from omnimerge.engine.inputs import InputFiles
from omnimerge.engine.knowledge import model_statistics
from omnimerge.engine.plan import MergePlan, worker_count
from omnimerge.engine.slices import SliceWorker
from omnimerge.engine.threads import one_thread, thread_pool

MEMORY = 10**9
"""Default of `LocalExecutor`: bytes for the buffers of all threads."""


class LocalExecutor:
    """Threads of this process. See `Executor`.

    Args:
        memory: bytes for the buffers of all threads together. A method that takes whole matrices
            gets those that are larger one at a time.
    """

    hashes = False

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
            todo = _Todo(plan, writer, self._memory)
            statistics = model_statistics(plan) if todo.anything else None

            def work() -> None:
                worker = SliceWorker(plan, statistics)
                try:
                    while task := todo.next_task():
                        with todo.room_for(task):
                            _run_task(worker, writer, task, todo, report)
                except BaseException:
                    todo.ended.set()
                    raise

            with thread_pool() as pool:
                futures = [pool.submit(work) for _ in range(worker_count())]
                try:
                    for future in futures:
                        future.result()
                except BaseException:  # KeyboardInterrupt too: let the workers end
                    todo.ended.set()
                    raise

    def close(self) -> None:
        """Nothing is held."""


class _Todo:
    """What is left to do, shared by the threads."""

    def __init__(self, plan: MergePlan, writer: CheckpointWriter, memory: int) -> None:
        self._plan = plan
        self._tasks = tasks_left(plan, writer)
        self._lock = threading.Lock()
        self._memory, self._used = memory, 0
        self._freed = threading.Condition()
        self.anything = writer.resumed < plan.bytes_to_write
        self.ended = threading.Event()

    @contextmanager
    def room_for(self, task: Task) -> Iterator[None]:
        """Wait until the task's buffers fit; one that never fits runs alone."""
        cost = self._plan.memory_of(task.job)
        with self._freed:
            while self._used and self._used + cost > self._memory and not self.ended.is_set():
                self._freed.wait(timeout=1.0)
            self._used += cost
        try:
            yield
        finally:
            with self._freed:
                self._used -= cost
                self._freed.notify_all()

    def next_task(self) -> Task | None:
        with self._lock:
            return None if self.ended.is_set() else next(self._tasks, None)


def _run_task(
    worker: SliceWorker, writer: CheckpointWriter, task: Task, todo: _Todo, report: Report
) -> None:
    job = task.job
    for start, stop in task.slices:
        if todo.ended.is_set():
            return
        result = worker.compute(job, start, stop)
        data = result.view(torch.uint8).numpy().data
        writer.write(job.output.name, data, start * item_size(job.output.dtype))
        report(int(data.nbytes))
