"""Carry out a plan on accelerators: several lanes to each, every lane a thread of this process.

What is merged is read into a lane's buffers, computed on the device, and written from the lane's
buffers; what is kept is copied without going there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from omnimerge.checkpoint import CheckpointWriter
from omnimerge.checkpoint.dtypes import item_size
from omnimerge.engine.devices import describe_device
from omnimerge.engine.executor import Report, Task
from omnimerge.engine.inputs import InputFiles
from omnimerge.engine.knowledge import model_statistics
from omnimerge.engine.lane import BUFFERS, Lane
from omnimerge.engine.local import MEMORY, Room, Todo
from omnimerge.engine.parents import free_bytes
from omnimerge.engine.plan import CHUNK_ELEMENTS, MergePlan, worker_count
from omnimerge.engine.slices import SliceWorker
from omnimerge.engine.threads import one_thread
from omnimerge.errors import ExecutorError

# Elements of a slice: a call costs the same however many there are, and a GPU is fast.
_ELEMENTS = 1 << 22
_LARGEST_PIECE, _SMALLEST_PIECE = 1 << 24, 1 << 16
_SHARE = 0.8  # of the device's free memory
# `memory_of` counts on reused buffers; here every step has tensors of its own, some in float64.
_WORKSPACE = 2

MakeLane = Callable[[str, int], Lane]
"""(Device, bytes of a buffer) -> a lane."""


@dataclass(frozen=True)
class _Device:
    """One of the devices.

    Attributes:
        name: for example ``cuda:0``.
        room: its memory.
        elements: of a slice.
    """

    name: str
    room: Room
    elements: int


class DeviceExecutor:
    """Threads that compute on accelerators. See `Executor`.

    Args:
        devices: torch devices, for example ``cuda:0``.
        memory: bytes on the host for the buffers of all threads together, the pinned ones too.
        make_lane: makes the lanes.
        free: device -> bytes that are free there.

    Attributes:
        devices: what is used, for the manifest.
    """

    hashes = False

    def __init__(
        self,
        devices: Sequence[str],
        memory: int = MEMORY,
        make_lane: MakeLane = Lane,
        free: Callable[[str], int] = free_bytes,
    ) -> None:
        self.devices: Mapping[str, str] = {each: describe_device(each) for each in devices}
        self._lanes = max(2, worker_count())
        self._memory = memory
        self._make_lane, self._free = make_lane, free

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

        Raises:
            ExecutorError: if a device has not enough memory.
        """
        count = self._lanes * len(self.devices)
        piece = _piece(self._memory // 2 // (BUFFERS * count))
        limits = {each: int(_SHARE * self._free(each)) for each in self.devices}
        per_element = _WORKSPACE * plan.memory_per_element
        elements = min(limits.values()) // (self._lanes * per_element)
        elements = min(max(elements, CHUNK_ELEMENTS), _ELEMENTS)
        with one_thread(), _full_products():
            rest = max(0, self._memory - BUFFERS * count * piece)
            todo = Todo(plan, writer, rest, elements)
            statistics = model_statistics(plan, memory=rest) if todo.anything else None

            def work(device: _Device) -> None:
                lane = self._make_lane(device.name, piece)
                here = SliceWorker(plan, statistics)
                there = SliceWorker(plan, statistics, lane=lane)
                with lane.active():
                    for task in todo:
                        if task.job.merged:
                            _compute(plan, todo, task, device, there, lane, report)
                        else:
                            todo.write(here, task, report)

            found = [_Device(n, Room(size, todo.ended), elements) for n, size in limits.items()]
            todo.do([partial(work, each) for each in found for _ in range(self._lanes)])

    def close(self) -> None:
        """Give back what torch keeps of the devices' memory for a next use."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


@contextmanager
def _full_products() -> Iterator[None]:
    """Multiply float32 matrices as such: images and callers may have asked for TF32's 10 bits."""
    settings = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32"  # before 2.9
    before = getattr(settings, name)
    setattr(settings, name, "ieee" if name == "fp32_precision" else False)
    try:
        yield
    finally:
        setattr(settings, name, before)


def _piece(nbytes: int) -> int:
    """A power of two, as pinned memory is given out, within bounds."""
    return min(max(1 << max(0, nbytes.bit_length() - 1), _SMALLEST_PIECE), _LARGEST_PIECE)


def _compute(
    plan: MergePlan,
    todo: Todo,
    task: Task,
    device: _Device,
    worker: SliceWorker,
    lane: Lane,
    report: Report,
) -> None:
    """Compute a task on the device, and write it; alone there, if its memory is short."""
    cost = _WORKSPACE * plan.memory_of(task.job, device.elements)
    for start, stop in task.slices:
        if todo.ended.is_set():
            return
        one = Task(task.number, task.job, ((start, stop),))
        with device.room.taken(cost):
            if _write(todo, one, worker, lane, report):
                continue
        with device.room.taken(max(cost, device.room.limit)):
            if lane.device.type == "cuda":
                torch.cuda.empty_cache()  # for its libraries, which do not ask torch for memory
            if not _write(todo, one, worker, lane, report):
                raise ExecutorError(
                    f"{device.name} has too little memory for tensor {task.job.output.name!r} "
                    f"(about {cost / 1e9:.1f} GB are needed); end what else runs on it, or merge "
                    "with --device cpu"
                )


def _write(todo: Todo, one: Task, worker: SliceWorker, lane: Lane, report: Report) -> bool:
    """Compute one slice and write it; false if the device's memory was too short."""
    job, ((start, stop),) = one.job, one.slices
    try:
        result = worker.compute(job, start, stop)
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return False
    place = start * item_size(job.output.dtype)
    for first, data in lane.download(result):
        todo.put(job, place + first, data, report)
    return True


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is of a device's memory; those of its libraries say so in words only."""
    words = ("out of memory", "ALLOC_FAILED", "cublasCreate", "cusolverDnCreate")
    text = str(error)
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(each in text for each in words)
