"""What a task of a distributed merge does on its machine; nothing here knows Ray.

A process opens the plan once, holds it against what the driver sees, and then computes, writes or
reads back what it is told to.
"""

from __future__ import annotations

import hashlib
import os
import platform
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnimerge.checkpoint import CheckpointWriter
from omnimerge.checkpoint.dtypes import item_size
from omnimerge.checkpoint.journal import journal_key
from omnimerge.checkpoint.staging import JOURNAL_NAME
from omnimerge.engine.inputs import InputFiles, absolute_recipe, checkpoints_of, jobs_digest
from omnimerge.engine.knowledge import measure_all
from omnimerge.engine.loading import load_recipe
from omnimerge.engine.manifest import versions
from omnimerge.engine.plan import MergePlan, TensorJob
from omnimerge.engine.planning import build_plan
from omnimerge.engine.slices import SliceWorker
from omnimerge.errors import ExecutorError, OmnimergeError, OutputError
from omnimerge.methods import Statistics

_BLOCK = 1 << 22

Written = tuple[int, int, int]
"""First byte in the file, one past the last, CRC-32 of what was written there."""


@dataclass(frozen=True)
class Work:
    """What every task gets.

    Attributes:
        recipe: with absolute paths.
        forced: gates that the driver waived.
        references: what the user calls the checkpoints, for messages.
        seen: the inputs and versions that the driver sees.
        folder: the hidden folder.
        key: of the merge.
    """

    recipe: dict[str, Any]
    forced: tuple[str, ...]
    references: tuple[str, ...]
    seen: dict[str, Any]
    folder: str
    key: str


@dataclass(frozen=True)
class Piece:
    """Elements of one tensor: the job's number, its first byte in the file, its slices."""

    job: int
    offset: int
    slices: tuple[tuple[int, int], ...]


def describe_work(plan: MergePlan, files: InputFiles, writer: CheckpointWriter) -> Work:
    """Describe a merge to its workers.

    Args:
        plan: what to do.
        files: its inputs.
        writer: its output.

    Returns:
        What every task gets.
    """
    return Work(
        recipe=absolute_recipe(plan),
        forced=plan.forced,
        references=tuple(each.reference for each in checkpoints_of(plan)),
        seen=_seen(plan, files),
        folder=str(writer.folder.absolute()),
        key=writer.key,
    )


def _seen(plan: MergePlan, files: InputFiles) -> dict[str, Any]:
    """What decides the bytes of the output, under the name that a message gives it."""
    done = jobs_digest(plan) + str(plan.shards)
    found: dict[str, Any] = {f"version of {name}": each for name, each in versions().items()}
    for each in files.describe():
        file = each.pop("file")
        found |= {f"{what} of {file}": value for what, value in each.items()}
    return {**found, "plan": hashlib.sha256(done.encode()).hexdigest()}


class _Opened:
    """A plan, opened in a worker process; the tasks of one merge share it."""

    def __init__(self, work: Work) -> None:
        here = platform.node()
        try:
            recipe = load_recipe(work.recipe)
            self.plan = build_plan(recipe, force=work.forced, ancestor=False)
            seen = _seen(self.plan, InputFiles(self.plan))
        except OmnimergeError as error:
            raise ExecutorError(
                f"machine {here} cannot do what the driver can: {error}; all machines have to see "
                "the same folders, and to have the same packages"
            ) from error
        if different := _differences(work.seen, seen):
            raise ExecutorError(
                f"machine {here} does not see what the driver sees: {different}; all machines have "
                "to see the same folders, and to have the same packages"
            )
        for checkpoint, reference in zip(checkpoints_of(self.plan), work.references, strict=True):
            checkpoint.reference = reference
        torch.set_num_threads(1)  # other tasks have the other cores
        self.worker: SliceWorker | None = None


_opened: dict[Work | str, _Opened] = {}


def _open(work: Work) -> _Opened:
    found = _opened.get(work.key)
    if found is None:
        _opened.clear()
        found = _opened[work.key] = _Opened(work)
    return found


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    names = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def measure(
    work: Work, known: Statistics, number: int, slices: Sequence[tuple[int, int, int]]
) -> list[Tensor]:
    """A task: look at slices of the inputs.

    Args:
        work: the merge.
        known: the method's statistics, as the driver knows them.
        number: of the pass.
        slices: (number of the job, first element, one past the last).

    Returns:
        What `measure_all` found.
    """
    jobs = _open(work).plan.jobs
    return measure_all(known, number, [(jobs[n], start, stop) for n, start, stop in slices])


def write_pieces(
    work: Work, known: Statistics | None, name: str, pieces: Sequence[Piece]
) -> list[Written]:
    """A task: compute slices, write them at their places of a file, wait for the disk.

    Args:
        work: the merge.
        known: the method's statistics.
        name: of the file.
        pieces: what to compute.

    Returns:
        What was written.
    """
    opened = _open(work)
    worker = opened.worker = opened.worker or SliceWorker(opened.plan, known)
    descriptor = _file_of(work, name, os.O_WRONLY)
    written: list[Written] = []
    try:
        for piece in pieces:
            job = opened.plan.jobs[piece.job]
            for start, stop in piece.slices:
                place = piece.offset + start * item_size(job.output.dtype)
                _append(written, place, _put(descriptor, worker, job, start, stop, place))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        worker.forget()  # the process stays, and its next task may have asked for less memory
    return written


def _put(
    descriptor: int, worker: SliceWorker, job: TensorJob, start: int, stop: int, place: int
) -> memoryview:
    data = worker.compute(job, start, stop).view(torch.uint8).numpy().data
    left = data
    while left.nbytes:
        count = os.pwrite(descriptor, left, place)
        left, place = left[count:], place + count
    return data


def _append(written: list[Written], place: int, data: memoryview) -> None:
    """Join what follows without a gap."""
    if written and written[-1][1] == place:
        start, _, crc = written.pop()
    else:
        start, crc = place, 0
    written.append((start, place + data.nbytes, zlib.crc32(data, crc)))


def read_back(work: Work, name: str, written: Sequence[Written]) -> str:
    """A task: hash a file, and hold it against what the tasks wrote into it.

    Args:
        work: the merge.
        name: of the file.
        written: everything that tasks of this run wrote into it, in order of place.

    Returns:
        The SHA-256 of the whole file.

    Raises:
        OutputError: if the file holds something else.
    """
    digest = hashlib.sha256()
    descriptor = _file_of(work, name, os.O_RDONLY)
    try:
        position = 0
        for start, stop, crc in written:
            _hash(descriptor, position, start, digest)
            if _hash(descriptor, start, stop, digest) != crc:
                raise OutputError(
                    f"{Path(work.folder) / name} does not hold what was written to it at bytes "
                    f"{start:,} to {stop:,}: the machines' view of the storage is not coherent; "
                    "merge again on one machine, or on other storage"
                )
            position = stop
        _hash(descriptor, position, os.fstat(descriptor).st_size, digest)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _hash(descriptor: int, start: int, stop: int, digest: Any) -> int:
    """Hash bytes of a file; return their CRC-32."""
    crc = 0
    while start < stop and (block := os.pread(descriptor, min(_BLOCK, stop - start), start)):
        digest.update(block)
        crc, start = zlib.crc32(block, crc), start + len(block)
    return crc


def _file_of(work: Work, name: str, flags: int) -> int:
    """Open a file of the output, which has to be of this merge still."""
    file = Path(work.folder) / name
    try:
        descriptor = os.open(file, flags)
    except FileNotFoundError as error:
        raise ExecutorError(
            f"machine {platform.node()} does not see {file}; the output has to lie on storage that "
            "all machines share"
        ) from error
    # After opening: a file of this name that comes later is not the one that is open.
    if journal_key(file.with_name(JOURNAL_NAME)) != work.key:
        os.close(descriptor)
        raise ExecutorError(f"{file} belongs to another merge by now; nothing was written to it")
    return descriptor
