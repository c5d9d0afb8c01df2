"""Carry out a plan: merge the language model, copy the parts, fill in the rows of new tokens."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimerge.checkpoint import Checkpoint, CheckpointWriter, OutputTensor
from omnimerge.checkpoint.dtypes import item_size, torch_dtype
from omnimerge.checkpoint.small_file import read_bytes
from omnimerge.checkpoint.staging import refuse_full_disk
from omnimerge.checkpoint.writer import refuse_existing
from omnimerge.compose.card import card
from omnimerge.compose.parts import PartPlan
from omnimerge.compose.plan import ComposePlan, build_plan, is_vocabulary
from omnimerge.compose.recipe import ComposeRecipe, load_recipe
from omnimerge.engine.execute import merged_tensors
from omnimerge.engine.inputs import SourceFiles, checkpoints_of, protect_inputs
from omnimerge.engine.knowledge import model_statistics
from omnimerge.engine.manifest import manifest, roles, stored, write_manifest
from omnimerge.engine.plan import MergePlan, TensorJob, worker_count
from omnimerge.engine.slices import SliceWorker, slices_of
from omnimerge.engine.threads import thread_pool
from omnimerge.errors import OutputError

Progress = Callable[[int, int], None]
_Work = Callable[[SliceWorker], None]


def compose(
    recipe: str | Path | Mapping[str, Any] | ComposeRecipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    force: Collection[str] = (),
    on_progress: Progress | None = None,
) -> ComposePlan:
    """Compose models of several modalities into a folder that transformers loads.

    The folder holds the weights, the configuration, one tokenizer and processor, the files of the
    parts' own processors, a manifest and a model card. It appears complete or not at all.

    Args:
        recipe: a YAML file, the mapping it would hold, or a `ComposeRecipe`.
        out: the folder to create.
        overwrite: replace an existing folder, once the new one is complete.
        force: names of gates to waive: `accounting`, `geometry`, `quantization`, `ancestor`,
            `finite`.
        on_progress: called with (bytes written, bytes to write).

    Returns:
        The plan that was carried out.

    Raises:
        RecipeError: if the recipe is wrong; all problems at once.
        CheckpointError: if a checkpoint cannot be read or changes meanwhile, or lacks tensors or a
            processor.
        NotMergeableError: if the language models do not fit, a model has no features to offer, or
            a modality is provided twice.
        NonFiniteError: if an input holds NaN or infinity.
        OutputError: if the output exists or cannot be written.
    """
    out = Path(out)
    refuse_existing(out, overwrite=overwrite)
    plan = build_plan(load_recipe(recipe), force=force)
    _check_out(plan, out)
    generation = plan.merge.target.folder / "generation_config.json"
    files = SourceFiles(checkpoints_of(plan.merge), [generation] if generation.is_file() else [])
    # Rows of new tokens are written over others: files are hashed when they are complete.
    with CheckpointWriter(out, plan.shards, overwrite=overwrite, hashing=False) as writer:
        _Stream(plan, writer, on_progress).run()
        _verify(plan, writer)
        _write_files(plan, writer, files)
    return plan


def copying(merge: MergePlan, checkpoint: Checkpoint) -> MergePlan:
    """Return a merge that copies from another checkpoint, with the same checks for NaN and range.

    Args:
        merge: the merge.
        checkpoint: what is copied from.

    Returns:
        What `copy_job` is a job of.
    """
    return replace(merge, target=checkpoint)


def copy_job(name: str, output: OutputTensor) -> TensorJob:
    """Return the job that copies a tensor.

    Args:
        name: the tensor on disk.
        output: what it becomes: dtype and shape.

    Returns:
        The job.
    """
    copied = OutputTensor(name, output.dtype, output.shape)
    return TensorJob(copied, "", (), None, {}, None, "a tensor of a part")


def _check_out(plan: ComposePlan, out: Path) -> None:
    protect_inputs(out, checkpoints_of(plan.merge))
    refuse_full_disk(out, plan.bytes_to_write)


class _Stream:
    """Writes all tensors, several chunks at a time; memory is bounded by chunks."""

    def __init__(
        self, plan: ComposePlan, writer: CheckpointWriter, on_progress: Progress | None
    ) -> None:
        self._plan = plan
        self._writer = writer
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._done = 0
        self._planned = {tensor.name: tensor for tensor in plan.tensors}

    def run(self) -> None:
        """Write every tensor, then the rows of new tokens over those of the target."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # chunks run in parallel already
        try:
            self._run()
            for place, number, row in _rows(self._plan):
                self._write(place, row, number * row.numel() * row.element_size(), counts=False)
        finally:
            torch.set_num_threads(threads)

    def _run(self) -> None:
        merge = self._plan.merge
        statistics, todo, ended = model_statistics(merge), self._work(), threading.Event()

        def work() -> None:
            worker = SliceWorker(merge, statistics)
            try:
                while not ended.is_set() and (task := self._next(todo)):
                    task(worker)
            except BaseException:
                ended.set()
                raise

        with thread_pool() as pool:
            futures = [pool.submit(work) for _ in range(worker_count())]
            try:
                for future in futures:
                    future.result()
            except BaseException:  # KeyboardInterrupt too: let the workers end
                ended.set()
                raise

    def _next(self, todo: Iterator[_Work]) -> _Work | None:
        with self._lock:
            return next(todo, None)

    def _work(self) -> Iterator[_Work]:
        for job in self._plan.merge.jobs:
            yield self._merging(job)
        for part in self._plan.parts.values():
            for name, place in part.tensors.items():
                yield self._copying(part.checkpoint, name, place)

    def _merging(self, job: TensorJob) -> _Work:
        place, size = self._plan.names[job.output.name], item_size(job.output.dtype)

        def task(worker: SliceWorker) -> None:
            for start, stop in slices_of(self._plan.merge, job):
                self._write(place, worker.compute(job, start, stop), start * size)

        return task

    def _copying(self, checkpoint: Checkpoint, name: str, place: str) -> _Work:
        job = copy_job(name, self._planned[place])
        size = item_size(job.output.dtype)

        def task(_: SliceWorker) -> None:
            worker = SliceWorker(copying(self._plan.merge, checkpoint))
            for start, stop in slices_of(self._plan.merge, job):
                self._write(place, worker.compute(job, start, stop), start * size)

        return task

    def _write(self, place: str, data: Tensor, start: int, *, counts: bool = True) -> None:
        raw = data.contiguous().view(torch.uint8).numpy().data
        self._writer.write(place, raw, start)
        if counts:
            with self._lock:
                self._done += int(raw.nbytes)
                if self._on_progress:
                    self._on_progress(self._done, self._plan.bytes_to_write)


def language_model(plan: ComposePlan) -> Iterator[tuple[str, Tensor]]:
    """Compute the language model in memory, as a written composition would hold it.

    Args:
        plan: the plan.

    Yields:
        (tensor of the output, value), merged or not; tensor by tensor.

    Raises:
        NonFiniteError: if an input holds NaN or infinity, or the result overflows its dtype.
    """
    merge = plan.merge
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    merged = merged_tensors(merge)
    for job in merge.jobs:
        own = next(merged)[1] if job.merged else merge.target.read_tensor(job.output.name)
        value = own.to(torch_dtype(job.output.dtype))
        place = plan.names[job.output.name]
        if value.shape != shapes[place]:
            wider = value.new_zeros(shapes[place])
            wider[: len(value)] = value
            value = wider
        if is_vocabulary(job):
            value = value.clone()
            for _, number, row in _rows(plan, place):
                value[number] = row.reshape(value.shape[1:])
        yield place, value


def _rows(plan: ComposePlan, wanted: str | None = None) -> Iterator[tuple[str, int, Tensor]]:
    """Tensor of the output, row, and what the part that brings the row's token has there."""
    for part in plan.parts.values():
        sources = _rows_of(plan, part)
        worker = SliceWorker(copying(plan.merge, part.checkpoint))
        for job in plan.merge.jobs:
            source = sources.get(job.slot) if is_vocabulary(job) else None
            place = plan.names[job.output.name]
            if source is None or wanted not in (None, place):
                continue
            width = math.prod(job.output.shape[1:])
            theirs = copy_job(source, job.output)
            for each in part.brought:
                start = each.native * width
                yield place, each.id, worker.compute(theirs, start, start + width)


def _rows_of(plan: ComposePlan, part: PartPlan) -> dict[str, str]:
    """Slot of embedding and head -> the part's tensor; a tied head is its embedding."""
    merge = plan.merge
    slots: dict[str, str] = {}
    if part.checkpoint is merge.target:
        slots = dict(merge.alignments[0].target_slots.by_slot)
    for alignment in merge.alignments:
        if alignment.donor is part.checkpoint:
            slots = dict(alignment.donor_slots.by_slot)
    embed = "llm.embed.weight"
    found = {slot: slots[slot] for slot in (embed, "llm.head.weight", "llm.head.bias")
             if slot in slots}  # fmt: skip
    if embed in found:
        found.setdefault("llm.head.weight", found[embed])
    return found


def _write_files(plan: ComposePlan, writer: CheckpointWriter, files: SourceFiles) -> None:
    folder = writer.folder
    plan.config.save_pretrained(folder)
    plan.processor.save_pretrained(folder)
    generation = plan.merge.target.folder / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_bytes(read_bytes(generation))
    writer.write_index()
    described = _manifest(plan)
    files.check()  # nothing of them is read from here on
    write_manifest(described, folder, writer.digests())
    (folder / "README.md").write_text(card(described), encoding="utf-8")


def _manifest(plan: ComposePlan) -> dict[str, Any]:
    """The merge's manifest, with the output's names, the parts, and what goes nowhere."""
    found = manifest(plan.merge)
    recipe = found["recipe"]
    for entry, provides in zip(recipe["models"], plan.recipe.provides, strict=True):
        if provides is not None:
            entry["provides"] = list(provides) or ["text"]
    inputs = roles(plan.merge)
    found["composed"] = plan.to_dict()["parts"]
    for name, part in plan.parts.items():
        role = next(role for role, each in inputs.items() if each is part.checkpoint)
        # As the user wrote it: what came from the Hub lies in a folder of this machine alone.
        found["composed"][name] |= {"model": part.checkpoint.reference, "input": role}
    references = {each.location: each.reference for each in inputs.values()}
    found["unused"] = {references.get(at, at): names for at, names in plan.unused.items()}
    for alignment in found["alignments"]:
        alignment.pop("unused", None)
    tensors = {
        plan.names[name]: {"from": name, **entry} for name, entry in found["tensors"].items()
    }
    for name, part in plan.parts.items():
        tensors |= {place: {"part": name, "from": disk} for disk, place in part.tensors.items()}
    found["tensors"] = {
        tensor.name: {**tensors[tensor.name], "stored": stored(tensor)} for tensor in plan.tensors
    }
    return found


def _verify(plan: ComposePlan, writer: CheckpointWriter) -> None:
    """Read the written headers back and hold them against the plan."""
    written = writer.read_back()
    for tensor in plan.tensors:
        meta = written.pop(tensor.name, None)
        if meta is None or (meta.dtype, meta.shape) != (tensor.dtype, tensor.shape):
            raise OutputError(f"tensor {tensor.name!r} was not written as planned")
    if written:
        raise OutputError(f"tensors that were not planned were written: {sorted(written)}")
