"""Carry out a plan: read, compute and write chunk by chunk, several chunks at a time."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimerge.checkpoint import CheckpointWriter
from omnimerge.checkpoint.dtypes import item_size, torch_dtype
from omnimerge.checkpoint.writer import copy_files, refuse_existing
from omnimerge.engine.knowledge import model_statistics
from omnimerge.engine.manifest import write_manifest
from omnimerge.engine.parents import Parents
from omnimerge.engine.plan import (
    MergePlan,
    TensorJob,
    with_parameters,
    worker_count,
)
from omnimerge.engine.slices import SliceWorker, slices_of
from omnimerge.errors import OutputError

Progress = Callable[[int, int], None]
_Task = tuple[TensorJob, list[tuple[int, int]]]


def run_plan(
    plan: MergePlan,
    out: Path,
    *,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Merge: write the output folder, complete or not at all.

    Args:
        plan: what to do.
        out: the folder to create.
        overwrite: replace an existing folder, once the new one is complete.
        on_progress: called with (bytes written, bytes to write).
        finish: called with the folder, all files in place, before it gets its name; may add files.

    Raises:
        OutputError: if the output exists or cannot be written.
        NonFiniteError: if an input holds NaN or infinity, or the result overflows its dtype.
        CheckpointError: if an input cannot be read.
    """
    _protect_inputs(plan, out)
    refuse_existing(out, overwrite=overwrite)
    _check_disk(plan, out)
    with CheckpointWriter(out, plan.shards, overwrite=overwrite) as writer:
        _stream(plan, writer, on_progress)
        _copy_non_weights(plan, writer.folder)
        write_manifest(plan, writer.folder)
        _verify(plan, writer)
        if finish:
            finish(writer.folder)


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


def _stream(plan: MergePlan, writer: CheckpointWriter, on_progress: Progress | None) -> None:
    with _single_threaded_kernels():
        statistics = model_statistics(plan)
        todo = _Todo(plan, on_progress)

        def work() -> None:
            worker = SliceWorker(plan, statistics)
            try:
                while task := todo.next_task():
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

    def __init__(self, plan: MergePlan, on_progress: Progress | None) -> None:
        self._tasks = _tasks(plan)
        self._lock = threading.Lock()
        self._on_progress = on_progress
        self._done, self._total = 0, plan.bytes_to_write
        self.ended = threading.Event()

    def next_task(self) -> _Task | None:
        with self._lock:
            return None if self.ended.is_set() else next(self._tasks, None)

    def report(self, written: int) -> None:
        with self._lock:
            self._done += written
            if self._on_progress:
                self._on_progress(self._done, self._total)


def _tasks(plan: MergePlan) -> Iterator[_Task]:
    """Slices of tensors, in file order, so that reads and writes go forward through the files.

    A tensor that the method has to know as a whole is one task: its thread knows it then.
    """
    known = plan.method.new_statistics(plan.recipe.model_count(), plan.recipe.all_parameters)
    for job in plan.jobs:
        slices = slices_of(plan, job)
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


def _copy_non_weights(plan: MergePlan, folder: Path) -> None:
    names = plan.target.other_files()
    copy_files(plan.target.folder, names, folder, renamed={"README.md": "README.target.md"})
    if plan.recipe.dtype != "auto":
        config = _with_dtype(plan.target.config, plan.recipe.dtype)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


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
    free = shutil.disk_usage(parent).free
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
