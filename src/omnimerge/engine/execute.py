"""Carry out a plan: an executor computes and writes, the folder appears when all is there."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimerge.checkpoint import CheckpointWriter
from omnimerge.checkpoint.copying import copy_files
from omnimerge.checkpoint.dtypes import item_size, torch_dtype
from omnimerge.checkpoint.staging import clean, left_of, manifest_key, refuse_full_disk
from omnimerge.checkpoint.writer import MANIFEST_NAME, refuse_existing
from omnimerge.engine.accelerated import DeviceExecutor
from omnimerge.engine.devices import check_executor, devices_named
from omnimerge.engine.executor import EXECUTORS, Executor
from omnimerge.engine.inputs import InputFiles, checkpoints_of, merge_key, protect_inputs
from omnimerge.engine.knowledge import model_statistics
from omnimerge.engine.local import MEMORY, LocalExecutor
from omnimerge.engine.manifest import manifest, write_manifest
from omnimerge.engine.parents import Parents
from omnimerge.engine.plan import MergePlan, TensorJob
from omnimerge.engine.planning import with_parameters
from omnimerge.engine.slices import SliceWorker, slices_of
from omnimerge.engine.threads import one_thread
from omnimerge.errors import OutputError, RecipeError, one_line, suggestion

_CARD, _TARGET_CARD = "README.md", "README.target.md"

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes to write)."""


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
    executor: Executor | None = None,
    on_progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Outcome:
    """Merge: write the output folder, complete or not at all.

    What is done is written down several times a second, so that a merge that was killed can go on.

    Args:
        plan: what to do.
        out: the folder to create.
        overwrite: replace an existing folder, once the new one is complete.
        resume: go on with what an interrupted run of the same merge left; without one, begin.
        executor: who computes and writes; default: the threads of this process.
        on_progress: called with (bytes written, bytes to write), first with what was there.
        finish: called with the folder, all files in place, before it gets its name; may add the
            card, README.md.

    Returns:
        What of it was there already.

    Raises:
        OutputError: if the output exists or cannot be written, or another process writes it.
        NonFiniteError: if an input holds NaN or infinity, or the result overflows its dtype.
        CheckpointError: if an input cannot be read, or changes meanwhile.
    """
    protect_inputs(out, checkpoints_of(plan))
    files = InputFiles(plan)
    executor = executor or LocalExecutor()
    key = merge_key(plan, files, executor.devices)
    if resume and manifest_key(out) == key:
        for each in left_of(out):  # killed between taking its place and removing the earlier one
            if not each.resumable or each.key == key:
                clean(each)
        if on_progress:
            on_progress(plan.bytes_to_write, plan.bytes_to_write)
        return Outcome(plan.bytes_to_write, complete=True)
    refuse_existing(out, overwrite=overwrite)
    refuse_full_disk(out, plan.bytes_to_write + files.bytes_to_copy)
    writer = CheckpointWriter(
        out,
        plan.shards,
        overwrite=overwrite,
        key=key,
        resume=resume,
        hashing=not executor.hashes,
    )
    with writer, _memory_told():
        meter = _Meter(writer.resumed, plan.bytes_to_write, on_progress)
        executor.run(plan, files, writer, meter.report)
        writer.secure()
        _verify(plan, writer)
        _copy_non_weights(plan, writer.folder)
        files.check()
        writer.write_index()
        described = manifest(plan)
        described |= {"devices": dict(executor.devices)} if executor.devices else {}
        write_manifest({**described, "key": key}, writer.folder, writer.digests())
        if finish:
            finish(writer.folder)
    return Outcome(writer.resumed, complete=False)


def executor_named(
    name: str = "local",
    *,
    memory: int = MEMORY,
    address: str | None = None,
    device: str = "cpu",
) -> Executor:
    """Make an executor.

    Args:
        name: one of `EXECUTORS`.
        memory: bytes for the buffers of all threads; of a local one.
        address: of the Ray cluster, ``auto`` for the one that this machine is part of; None: the
            one that RAY_ADDRESS names, or one on this machine alone.
        device: what computes; of a local one. See `devices_named`.

    Returns:
        The executor; close it.

    Raises:
        RecipeError: if there is none of that name, or the device cannot be used.
        ExecutorError: if Ray is not installed, or the cluster cannot be reached.
    """
    if name not in EXECUTORS:
        problem = f"executor: {name!r} is none{suggestion(name, EXECUTORS)}"
        raise RecipeError([f"{problem}; known: {', '.join(EXECUTORS)}"], "the call")
    check_executor(device, name)
    if name == "ray":
        from omnimerge.engine.ray import RayExecutor

        return RayExecutor(address)
    if address is not None:
        raise RecipeError(["address: is for executor ray"], "the call")
    if devices := devices_named(device):
        return DeviceExecutor(devices, memory)
    return LocalExecutor(memory)


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
            with one_thread():  # as a merge to disk, to the same bits
                merged[start:stop] = worker.compute(job, start, stop)
        yield job.output.name, merged.reshape(job.output.shape)


@contextmanager
def _memory_told() -> Iterator[None]:
    """Say in one line that memory ran out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        words = ("can't allocate memory", "out of memory")  # torch's: on the CPU, of pinned memory
        if not known and not any(each in str(error) for each in words):
            raise
        reason = f"out of memory ({one_line(error)}); free some, or give a smaller --memory"
        raise OutputError(reason) from error


class _Meter:
    """Counts what is written, for whoever shows it."""

    def __init__(self, done: int, total: int, on_progress: Progress | None) -> None:
        self._done, self._total = done, total
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self.report(0)

    def report(self, written: int) -> None:
        """Take in that so many bytes more are written."""
        with self._lock:
            self._done += written
            if self._on_progress:
                self._on_progress(self._done, self._total)


def copied_files(plan: MergePlan) -> dict[Path, str]:
    """Name the target's files that an output has too.

    Of a target that was merged itself, the manifest stays behind; its card takes the place of the
    one of its own target.

    Args:
        plan: the merge.

    Returns:
        Path relative to the target's folder -> name in the output.
    """
    names = {name: str(name) for name in plan.target.other_files()}
    names.pop(Path(MANIFEST_NAME), None)
    if Path(_CARD) in names:
        names.pop(Path(_TARGET_CARD), None)
        names[Path(_CARD)] = _TARGET_CARD
    return names


def written_config(plan: MergePlan) -> str | None:
    """Return the config.json of an output.

    Args:
        plan: the merge.

    Returns:
        Its text; None where it is the target's as it is.
    """
    if plan.recipe.dtype == "auto" or plan.recipe.stores_float8:
        return None
    config = _with_dtype(plan.target.config, plan.recipe.dtype)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _copy_non_weights(plan: MergePlan, folder: Path) -> None:
    names = copied_files(plan)
    renamed = {str(name): new for name, new in names.items()}
    copy_files(plan.target.folder, list(names), folder, renamed=renamed)
    if (config := written_config(plan)) is not None:
        (folder / "config.json").write_text(config, encoding="utf-8")


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with every mention of the weights' dtype replaced, nested configs included."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            changed[key] = _with_dtype(value, dtype)
        else:
            changed[key] = dtype if key in ("dtype", "torch_dtype") else value
    return changed


def _verify(plan: MergePlan, writer: CheckpointWriter) -> None:
    """Read the written headers back and hold them against the target."""
    written = writer.read_back()
    for job in plan.jobs:
        meta = written.pop(job.output.name, None)
        if meta is None or (meta.dtype, meta.shape) != (job.output.dtype, job.output.shape):
            raise OutputError(f"tensor {job.output.name!r} was not written as planned")
    if written:
        raise OutputError(f"tensors that were not planned were written: {sorted(written)}")


def _numel(job: TensorJob) -> int:
    return job.output.nbytes // item_size(job.output.dtype)
