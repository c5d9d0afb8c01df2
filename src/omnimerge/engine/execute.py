"""Carry out a plan: read, compute and write chunk by chunk, several chunks at a time."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimerge.checkpoint import CheckpointWriter
from omnimerge.checkpoint.dtypes import item_size, torch_dtype
from omnimerge.checkpoint.staging import clean, leftovers
from omnimerge.checkpoint.writer import copy_files, refuse_existing
from omnimerge.engine.inputs import InputFiles, merge_key
from omnimerge.engine.knowledge import model_statistics
from omnimerge.engine.manifest import file_hash, manifest_key, write_manifest
from omnimerge.engine.parents import Parents
from omnimerge.engine.plan import (
    MergePlan,
    TensorJob,
    with_parameters,
    worker_count,
)
from omnimerge.engine.slices import SliceWorker, slices_of
from omnimerge.errors import OutputError

MEMORY = 10**9
"""Default of `run_plan`: bytes for the buffers of all threads."""

Progress = Callable[[int, int], None]
_Task = tuple[TensorJob, list[tuple[int, int]]]


@dataclass(frozen=True)
class Outcome:
    """How a merge went.

    Attributes:
        resumed: bytes of tensors that an earlier, interrupted run had written.
        complete: whether nothing was left to do.
    """

    resumed: int
    complete: bool


def run_plan(
    plan: MergePlan,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    memory: int = MEMORY,
    on_progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Outcome:
    """Merge: write the output folder, complete or not at all.

    What is done is written down about once a second, so that a merge that was killed can go on.

    Args:
        plan: what to do.
        out: the folder to create.
        overwrite: replace an existing folder, once the new one is complete.
        resume: go on with what an interrupted run of the same merge left; without one, begin.
        memory: bytes for the buffers of all threads together. A method that takes whole matrices
            gets those that are larger one at a time.
        on_progress: called with (bytes written, bytes to write), first with what was there.
        finish: called with the folder, all files in place, before it gets its name; may add files.

    Returns:
        What of it was there already.

    Raises:
        OutputError: if the output exists or cannot be written, or another process writes it.
        NonFiniteError: if an input holds NaN or infinity, or the result overflows its dtype.
        CheckpointError: if an input cannot be read, or changes meanwhile.
    """
    _protect_inputs(plan, out)
    files = InputFiles(plan)
    key = merge_key(plan, files)
    if resume and manifest_key(out) == key:
        for each in leftovers(out):  # killed between taking its place and removing the earlier one
            if not each.resumable and each.out == out:
                clean(each)
        if on_progress:
            on_progress(plan.bytes_to_write, plan.bytes_to_write)
        return Outcome(plan.bytes_to_write, complete=True)
    refuse_existing(out, overwrite=overwrite)
    _check_disk(plan, out)
    writer = CheckpointWriter(out, plan.shards, overwrite=overwrite, key=key, resume=resume)
    with writer:
        _stream(plan, writer, memory, on_progress)
        _verify(plan, writer)
        copied = _copy_non_weights(plan, writer.folder)
        files.check()
        digests = writer.digests() | {name: file_hash(writer.folder / name) for name in copied}
        write_manifest(plan, writer.folder, key=key, files=dict(sorted(digests.items())))
        if finish:
            finish(writer.folder)
    return Outcome(writer.resumed, complete=False)


def merged_tensors(
    plan: MergePlan,
    parameters: Mapping[str, Any] | None = None,
    overrides: Sequence[Mapping[str, Any]] = (),
    parents: Parents | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Compute the merged tensors in memory, one by one, as a written checkpoint would hold them.

    Args:
        plan: what to do.
        parameters: keywords that replace the recipe's, for example ``{"alpha": 0.2}``.
        overrides: entries to put before the recipe's own overrides.
        parents: inputs that are in memory already, for the next of many merges; see `Parents.hold`.

    Yields:
        (target tensor name, tensor in the output dtype) for every tensor that the merge changes,
        on the device of the parents.

    Raises:
        NonFiniteError: if an input holds NaN or infinity, or the result overflows its dtype.
    """
    plan = with_parameters(plan, parameters or {}, overrides)
    held = parents.get if parents else None
    worker = SliceWorker(plan, model_statistics(plan, held), held=held)
    device = parents.device if parents else "cpu"
    for job in plan.merged:
        merged = torch.empty(_numel(job), dtype=torch_dtype(job.output.dtype), device=device)
        for start, stop in slices_of(plan, job):
            merged[start:stop] = worker.compute(job, start, stop)
        yield job.output.name, merged.reshape(job.output.shape)


def _stream(
    plan: MergePlan, writer: CheckpointWriter, memory: int, on_progress: Progress | None
) -> None:
    with _single_threaded_kernels():
        todo = _Todo(plan, writer, memory, on_progress)
        statistics = model_statistics(plan) if todo.anything else None

        def work() -> None:
            worker = SliceWorker(plan, statistics)
            try:
                while task := todo.next_task():
                    with todo.room_for(task):
                        _run_task(worker, writer, task, todo)
            except BaseException:
                todo.ended.set()
                raise

        with ThreadPoolExecutor(worker_count()) as pool:
            futures = [pool.submit(work) for _ in range(worker_count())]
            try:
                for future in futures:
                    future.result()
            except BaseException:  # KeyboardInterrupt too: let the workers end
                todo.ended.set()
                raise


class _Todo:
    """What is left to do, shared by the workers."""

    def __init__(
        self,
        plan: MergePlan,
        writer: CheckpointWriter,
        memory: int,
        on_progress: Progress | None,
    ) -> None:
        self._plan = plan
        self._tasks = _tasks(plan, writer)
        self._lock = threading.Lock()
        self._on_progress = on_progress
        self._done, self._total = writer.resumed, plan.bytes_to_write
        self._memory, self._used = memory, 0
        self._freed = threading.Condition()
        self.ended = threading.Event()
        if on_progress:
            on_progress(self._done, self._total)

    @property
    def anything(self) -> bool:
        """Whether anything is left at all."""
        return self._done < self._total

    @contextmanager
    def room_for(self, task: _Task) -> Iterator[None]:
        """Wait until the task's buffers fit; one that never fits runs alone."""
        cost = self._plan.memory_of(task[0])
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

    def next_task(self) -> _Task | None:
        with self._lock:
            return None if self.ended.is_set() else next(self._tasks, None)

    def report(self, written: int) -> None:
        with self._lock:
            self._done += written
            if self._on_progress:
                self._on_progress(self._done, self._total)


def _tasks(plan: MergePlan, writer: CheckpointWriter) -> Iterator[_Task]:
    """Slices that are not written yet, in file order: reads and writes go forward through files.

    A tensor that the method has to know as a whole is one task: its thread knows it then.
    """
    known = plan.method.new_statistics(plan.recipe.model_count(), plan.recipe.all_parameters)
    for job in plan.jobs:
        size = item_size(job.output.dtype)
        slices = [
            (start, stop)
            for start, stop in slices_of(plan, job)
            if start == stop or not writer.has(job.output.name, start * size, stop * size)
        ]
        if not slices:
            continue
        if job.merged and known and known.scope == "tensor":
            yield job, slices
        else:
            yield from ((job, [each]) for each in slices)


def _run_task(worker: SliceWorker, writer: CheckpointWriter, task: _Task, todo: _Todo) -> None:
    job, slices = task
    for start, stop in slices:
        if todo.ended.is_set():
            return
        result = worker.compute(job, start, stop)
        data = result.view(torch.uint8).numpy().data
        writer.write(job.output.name, data, start * item_size(job.output.dtype))
        todo.report(int(data.nbytes))


def _copy_non_weights(plan: MergePlan, folder: Path) -> list[str]:
    """Copy the target's other files; return their names in the output."""
    names, renamed = plan.target.other_files(), {"README.md": "README.target.md"}
    copy_files(plan.target.folder, names, folder, renamed=renamed)
    if plan.recipe.dtype != "auto":
        config = _with_dtype(plan.target.config, plan.recipe.dtype)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return [renamed.get(str(name), str(name)) for name in names]


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with every mention of the weights' dtype replaced, nested configs included."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            changed[key] = _with_dtype(value, dtype)
        else:
            changed[key] = dtype if key in ("dtype", "torch_dtype") else value
    return changed


def _protect_inputs(plan: MergePlan, out: Path) -> None:
    resolved = out.resolve()
    for checkpoint in (plan.target, *plan.models, *([plan.base] if plan.base else [])):
        for folder in {checkpoint.folder.resolve(), *(f.parent for f in checkpoint.files)}:
            if folder.resolve() == resolved or resolved in folder.resolve().parents:
                raise OutputError(f"{out} is or holds an input of this merge; give another folder")


def _check_disk(plan: MergePlan, out: Path) -> None:
    parent = next((p for p in out.absolute().parents if p.is_dir()), Path("/"))
    free = shutil.disk_usage(parent).free + sum(each.nbytes for each in leftovers(out))
    if free < plan.bytes_to_write:
        raise OutputError(
            f"no space left for {out}: {plan.bytes_to_write:,} bytes are needed and {free:,} are "
            "free; free some, or give a folder elsewhere"
        )


def _verify(plan: MergePlan, writer: CheckpointWriter) -> None:
    """Read the written headers back and hold them against the target."""
    written = writer.read_back()
    for job in plan.jobs:
        meta = written.pop(job.output.name, None)
        if meta is None or (meta.dtype, meta.shape) != (job.output.dtype, job.output.shape):
            raise OutputError(f"tensor {job.output.name!r} was not written as planned")
    if written:
        raise OutputError(f"tensors that were not planned were written: {sorted(written)}")


@contextmanager
def _single_threaded_kernels() -> Iterator[None]:
    """Chunks run in parallel already; threads inside each kernel would only fight over cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _numel(job: TensorJob) -> int:
    return job.output.nbytes // item_size(job.output.dtype)
