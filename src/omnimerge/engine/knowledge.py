"""What the method of a plan has to know before it merges, gathered in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from torch import Tensor

from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.dtypes import item_size
from omnimerge.engine.plan import MergePlan, TensorJob, worker_count
from omnimerge.errors import MethodError, NonFiniteError
from omnimerge.methods import Statistics

# Entries that are measured at once: large enough that what a measurement costs by itself is small.
_MEASURED_ELEMENTS = 1 << 20

Held = Callable[[Checkpoint, str], Tensor | None]
"""(Checkpoint, tensor name) -> the whole tensor, flat, if it is in memory; see `Parents.get`."""

_Slice = tuple[TensorJob, int, int]


def model_statistics(plan: MergePlan, held: Held | None = None) -> Statistics | None:
    """Gather what the method has to know of the whole model, on all threads.

    Args:
        plan: what to do; the recipe's own keywords count, overrides do not.
        held: inputs that are in memory already.

    Returns:
        The statistics; None if the method needs none, or those of single tensors.

    Raises:
        NonFiniteError: if an input holds NaN or infinity.
    """
    known = plan.method.new_statistics(plan.recipe.model_count(), plan.recipe.all_parameters)
    if known is None or known.scope == "tensor":
        return None
    with ThreadPoolExecutor(worker_count()) as pool:
        for number in range(known.passes):
            slices = (each for job in plan.merged for each in _slices(job))
            # Added up in order, whichever is measured first: sums of floats depend on it.
            while batch := list(islice(slices, 4 * worker_count())):
                futures = [pool.submit(_measured, known, number, each, held) for each in batch]
                for future in futures:
                    known.add(number, future.result())
            _close(known, number, "a merged tensor")
    return known


def tensor_statistics(
    plan: MergePlan, job: TensorJob, held: Held | None = None
) -> Statistics | None:
    """Gather what the method has to know of one tensor.

    Args:
        plan: what to do.
        job: the tensor, whose own keywords count.
        held: inputs that are in memory already.

    Returns:
        The statistics; None if the method needs none, or those of the whole model.

    Raises:
        NonFiniteError: if an input holds NaN or infinity.
    """
    known = plan.method.new_statistics(plan.recipe.model_count(), job.parameters)
    if known is None or known.scope == "model":
        return None
    for number in range(known.passes):
        for each in _slices(job):
            known.add(number, _measured(known, number, each, held))
        _close(known, number, f"tensor {job.output.name!r}")
    return known


def _measured(statistics: Statistics, number: int, each: _Slice, held: Held | None) -> Tensor:
    job, start, stop = each

    def read(checkpoint: Checkpoint, name: str) -> Tensor:
        kept = held(checkpoint, name) if held else None
        return checkpoint.read(name, start, stop) if kept is None else kept[start:stop].cpu()

    models = [read(checkpoint, name) for checkpoint, name in job.sources]
    return statistics.measure(number, models, read(*job.base) if job.base else None)


def _close(statistics: Statistics, number: int, where: str) -> None:
    try:
        statistics.close(number)
    except MethodError as error:
        raise NonFiniteError(
            f"{where}: {error}; repair the checkpoint, or keep the target's tensor with an override"
        ) from error


def _slices(job: TensorJob) -> Iterator[_Slice]:
    numel = job.output.nbytes // item_size(job.output.dtype)
    for start in range(0, numel, _MEASURED_ELEMENTS):
        yield job, start, min(start + _MEASURED_ELEMENTS, numel)
