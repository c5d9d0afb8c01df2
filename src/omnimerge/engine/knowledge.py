"""What the method of a plan has to know before it merges, gathered in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from torch import Tensor

from omnimerge.checkpoint.dtypes import item_size
from omnimerge.engine.plan import MergePlan, TensorJob, worker_count
from omnimerge.errors import MethodError, NonFiniteError
from omnimerge.methods import Statistics

# Entries that are measured at once: large enough that what a measurement costs by itself is small.
_MEASURED_ELEMENTS = 1 << 20

_Slice = tuple[TensorJob, int, int]


def model_statistics(plan: MergePlan) -> Statistics | None:
    """Gather what the method has to know of the whole model, on all threads.

    Args:
        plan: what to do; the recipe's own keywords count, overrides do not.

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
                futures = [pool.submit(_measured, known, number, each) for each in batch]
                for future in futures:
                    known.add(number, future.result())
            _close(known, number, "a merged tensor")
    return known


def tensor_statistics(plan: MergePlan, job: TensorJob) -> Statistics | None:
    """Gather what the method has to know of one tensor.

    Args:
        plan: what to do.
        job: the tensor, whose own keywords count.

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
            known.add(number, _measured(known, number, each))
        _close(known, number, f"tensor {job.output.name!r}")
    return known


def _measured(statistics: Statistics, number: int, each: _Slice) -> Tensor:
    job, start, stop = each
    models = [checkpoint.read(name, start, stop) for checkpoint, name in job.sources]
    base = job.base[0].read(job.base[1], start, stop) if job.base else None
    return statistics.measure(number, models, base)


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
