"""Carry out a plan: read, compute and write chunk by chunk, several chunks at a time."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimerge.checkpoint import CheckpointWriter
from omnimerge.checkpoint.dtypes import is_floating, is_known, item_size, torch_dtype
from omnimerge.checkpoint.reader import Checkpoint
from omnimerge.checkpoint.writer import copy_files, refuse_existing
from omnimerge.engine.manifest import write_manifest
from omnimerge.engine.plan import (
    CHUNK_ELEMENTS,
    MergePlan,
    TensorJob,
    with_parameters,
    worker_count,
)
from omnimerge.errors import NonFiniteError, OutputError

Progress = Callable[[int, int], None]
_Task = tuple[TensorJob, int, int]


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
    plan: MergePlan, parameters: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Compute the merged tensors in memory, one by one, as a written checkpoint would hold them.

    Args:
        plan: what to do.
        parameters: keywords that replace the recipe's, for example ``{"alpha": 0.2}``.

    Yields:
        (target tensor name, tensor in the output dtype) for every tensor that the merge changes.

    Raises:
        NonFiniteError: if an input holds NaN or infinity, or the result overflows its dtype.
    """
    plan = with_parameters(plan, parameters or {})
    for job in plan.merged:
        numel = _numel(job)
        step = CHUNK_ELEMENTS if plan.method.elementwise else max(1, numel)
        pieces = [
            _merge_slice(plan, job, start, min(start + step, numel))
            for start in range(0, numel, step)
        ]
        flat = torch.cat(pieces) if pieces else torch.empty(0, dtype=_dtype(job))
        yield job.output.name, flat.reshape(job.output.shape)


def _stream(plan: MergePlan, writer: CheckpointWriter, on_progress: Progress | None) -> None:
    tasks = _tasks(plan)
    lock, stop = threading.Lock(), threading.Event()
    total, done = plan.bytes_to_write, 0

    def work() -> None:
        nonlocal done
        while not stop.is_set():
            with lock:
                task = next(tasks, None)
            if task is None:
                return
            try:
                written = _run_task(plan, writer, *task)
            except BaseException:
                stop.set()
                raise
            with lock:
                done += written
                if on_progress:
                    on_progress(done, total)

    with _single_threaded_kernels(), ThreadPoolExecutor(worker_count()) as pool:
        futures = [pool.submit(work) for _ in range(worker_count())]
        try:
            for future in futures:
                future.result()
        except BaseException:  # KeyboardInterrupt too: let the workers end
            stop.set()
            raise


def _tasks(plan: MergePlan) -> Iterator[_Task]:
    """Slices of tensors, in file order, so that reads and writes go forward through the files."""
    for job in plan.jobs:
        numel = _numel(job)
        whole = job.merged and not plan.method.elementwise
        step = numel if whole else CHUNK_ELEMENTS
        for start in range(0, numel, max(1, step)):
            yield job, start, min(start + step, numel)


def _run_task(
    plan: MergePlan, writer: CheckpointWriter, job: TensorJob, start: int, stop: int
) -> int:
    if job.merged:
        result = _merge_slice(plan, job, start, stop)
    else:
        result = _copy_slice(plan, job, start, stop)
    data = result.view(torch.uint8).numpy().data
    writer.write(job.output.name, data, start * item_size(job.output.dtype))
    return int(data.nbytes)


def _merge_slice(plan: MergePlan, job: TensorJob, start: int, stop: int) -> Tensor:
    models = [checkpoint.read(name, start, stop) for checkpoint, name in job.sources]
    base = job.base[0].read(job.base[1], start, stop) if job.base else None
    if not plan.method.elementwise:
        models = [model.reshape(job.output.shape) for model in models]
        base = base.reshape(job.output.shape) if base is not None else None
    merged = plan.method.fn(models, base, **job.parameters).flatten()
    # One pass in cache; only a non-finite sum leads to the exact, slower look.
    if not torch.isfinite(merged.sum()):
        _check_finite(plan, job, models, base, merged)
    result = merged.to(_dtype(job))
    if job.output.dtype == "F16" and not torch.isfinite(result.sum()):
        _check_overflow(job, result)
    return result


def _copy_slice(plan: MergePlan, job: TensorJob, start: int, stop: int) -> Tensor:
    kept = plan.target.read(job.output.name, start, stop)
    stored = plan.target.tensors[job.output.name].dtype
    checked = is_known(stored) and is_floating(stored) and "finite" not in plan.forced
    if checked and torch.isnan(kept.float() if kept.element_size() == 1 else kept).any():
        raise NonFiniteError(
            f"tensor {job.output.name!r} of {plan.target.reference} holds NaN; repair the "
            "checkpoint, or copy it as it is with --force finite"
        )
    return kept.to(_dtype(job))


def _check_finite(
    plan: MergePlan, job: TensorJob, models: list[Tensor], base: Tensor | None, merged: Tensor
) -> None:
    inputs: list[tuple[tuple[Checkpoint, str], Tensor]] = list(
        zip(job.sources, models, strict=True)
    )
    if job.base and base is not None:
        inputs.append((job.base, base))
    for (checkpoint, name), tensor in inputs:
        if not torch.isfinite(tensor.float()).all():
            raise NonFiniteError(
                f"tensor {name!r} of {checkpoint.reference} holds NaN or infinity; repair the "
                "checkpoint, or keep the target's tensor with an override"
            )
    if not torch.isfinite(merged).all():
        raise NonFiniteError(
            f"tensor {job.output.name!r} overflows when merged by {plan.method.name}; "
            "use smaller weights or scale"
        )


def _check_overflow(job: TensorJob, result: Tensor) -> None:
    if not torch.isfinite(result).all():
        raise NonFiniteError(
            f"tensor {job.output.name!r} overflows float16 when merged; set dtype: bfloat16"
        )


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


def _dtype(job: TensorJob) -> torch.dtype:
    return torch_dtype(job.output.dtype)
