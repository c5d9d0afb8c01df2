"""What the method of a plan has to know before it merges, gathered in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.dtypes import item_size, torch_dtype
from omnimerge.engine.lane import Lane
from omnimerge.engine.plan import MEASURED_ELEMENTS, MergePlan, TensorJob, worker_count
from omnimerge.engine.threads import one_thread, thread_pool
from omnimerge.errors import MethodError, NonFiniteError
from omnimerge.methods import Statistics

Buffers = dict[int, Tensor]
"""Number of an input -> bytes that its slices are read into, one after the other."""

Held = Callable[[Checkpoint, str], Tensor | None]
"""(Checkpoint, tensor name) -> the whole tensor, flat, if it is in memory; see `Parents.get`."""

Slice = tuple[TensorJob, int, int]
"""An output tensor, and the first and one past the last of its elements that are looked at."""

Pass = Callable[[Statistics, int], Iterable[Tensor]]
"""(What is known so far, number of the pass) -> measurements of the whole model, in order."""


def model_statistics(
    plan: MergePlan,
    held: Held | None = None,
    measured: Pass | None = None,
    memory: int | None = None,
) -> Statistics | None:
    """Gather what the method has to know of the whole model.

    Args:
        plan: what to do; the recipe's own keywords count, overrides do not.
        held: inputs that are in memory already.
        measured: who measures; default: the threads of this process.
        memory: bytes for the buffers of these threads; default: enough for all of them.

    Returns:
        The statistics; None if the method needs none, or those of single tensors.

    Raises:
        NonFiniteError: if an input holds NaN or infinity.
    """
    known = plan.method.new_statistics(plan.recipe.model_count(), plan.recipe.all_parameters)
    if known is None or known.scope == "tensor":
        return None
    measured = measured or _by_threads(plan, held, memory)
    for number in range(known.passes):
        for each in measured(known, number) if not known.idle(number) else ():
            known.add(number, each)
        _close(known, number, "a merged tensor")
    return known


def measured_slices(plan: MergePlan) -> Iterator[Slice]:
    """Cut the merged tensors into what is measured at once.

    Args:
        plan: what to do.

    Yields:
        Slices, in the order in which their measurements are added.
    """
    for job in plan.merged:
        yield from _slices(job)


def measure_all(statistics: Statistics, number: int, slices: Sequence[Slice]) -> list[Tensor]:
    """Measure slices that follow each other.

    Args:
        statistics: what is known so far.
        number: which pass this is.
        slices: some of `measured_slices`.

    Returns:
        Measurements to add, in order: of counts, which are exact in any order, the sum alone.
    """
    return list(_all_measured(statistics, number, slices, {}))


def _all_measured(
    statistics: Statistics,
    number: int,
    slices: Iterable[Slice],
    buffers: Buffers,
    held: Held | None = None,
    lane: Lane | None = None,
) -> Iterator[Tensor]:
    counts = None
    for each in slices:
        measured = _measured(statistics, number, each, buffers, held, lane, counts)
        if measured.is_floating_point():
            yield measured
        else:
            counts = measured
    if counts is not None:
        yield counts


def _by_threads(plan: MergePlan, held: Held | None, memory: int | None) -> Pass:
    cost = max(plan.memory_to_measure(job) for job in plan.merged)
    count = worker_count() if memory is None else min(worker_count(), max(1, memory // cost))
    own = threading.local()  # of each thread

    def measure(known: Statistics, number: int, each: Slice) -> Tensor:
        own.buffers = getattr(own, "buffers", {})
        return _measured(known, number, each, own.buffers, held)

    def measured(known: Statistics, number: int) -> Iterator[Tensor]:
        slices = measured_slices(plan)
        with one_thread(), thread_pool(count) as pool:
            # Added up in order, whichever is measured first: sums of floats depend on it.
            while batch := list(islice(slices, 4 * count)):
                futures = [pool.submit(measure, known, number, each) for each in batch]
                for future in futures:
                    yield future.result()

    return measured


def tensor_statistics(
    plan: MergePlan,
    job: TensorJob,
    buffers: Buffers,
    held: Held | None = None,
    lane: Lane | None = None,
) -> Statistics | None:
    """Gather what the method has to know of one tensor.

    Args:
        plan: what to do.
        job: the tensor, whose own keywords count.
        buffers: of this thread; filled, and used again.
        held: inputs that are in memory already.
        lane: to the device that counts; default: the CPU.

    Returns:
        The statistics; None if the method needs none, or those of the whole model.

    Raises:
        NonFiniteError: if an input holds NaN or infinity.
    """
    known = plan.method.new_statistics(plan.recipe.model_count(), job.parameters)
    if known is None or known.scope == "model":
        return None
    for number in range(known.passes):
        slices = _slices(job) if not known.idle(number) else ()
        for each in _all_measured(known, number, slices, buffers, held, lane):
            known.add(number, each)
        _close(known, number, f"tensor {job.output.name!r}")
    return known


def _measured(
    statistics: Statistics,
    number: int,
    each: Slice,
    buffers: Buffers,
    held: Held | None = None,
    lane: Lane | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    job, start, stop = each

    def read(n: int, checkpoint: Checkpoint, name: str) -> Tensor:
        if lane:
            return lane.read(checkpoint, name, start, stop)
        kept = held(checkpoint, name) if held else None
        if kept is not None:
            return kept[start:stop].cpu()
        part = buffer(buffers, n, checkpoint.tensors[name].dtype, stop - start)
        checkpoint.read_into(part, name, start)
        return part

    models = [read(n, checkpoint, name) for n, (checkpoint, name) in enumerate(job.sources)]
    base = read(len(models), *job.base) if job.base else None
    return statistics.measure(number, models, base, counts)


def buffer(
    buffers: Buffers, number: int, dtype: str, elements: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Give memory for a slice of an input: the same as before, where that is enough.

    Args:
        buffers: what was given so far.
        number: of the input.
        dtype: its storage type, as safetensors names it.
        elements: of the slice.
        device: where.

    Returns:
        A flat tensor; what it holds is left over.
    """
    nbytes = elements * item_size(dtype)
    held = buffers.get(number)
    if held is None or held.numel() < nbytes:
        held = buffers[number] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return held[:nbytes].view(torch_dtype(dtype))


def _close(statistics: Statistics, number: int, where: str) -> None:
    try:
        statistics.close(number)
    except MethodError as error:
        raise NonFiniteError(
            f"{where}: {error}; repair the checkpoint, or keep the target's tensor with an override"
        ) from error


def _slices(job: TensorJob) -> Iterator[Slice]:
    numel = job.output.nbytes // item_size(job.output.dtype)
    for start in range(0, numel, MEASURED_ELEMENTS):
        yield job, start, min(start + MEASURED_ELEMENTS, numel)
