"""Compute one slice of an output tensor: read it from every input, merge or copy, round once.

Each thread has an object of its own with its buffers. Reusing them matters: fresh megabyte-sized
tensors for every step cost more in page faults than the arithmetic does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from omnimerge.checkpoint import Checkpoint
from omnimerge.checkpoint.dtypes import is_floating, is_known, item_size, torch_dtype
from omnimerge.engine.plan import CHUNK_ELEMENTS, MergePlan, TensorJob
from omnimerge.errors import NonFiniteError
from omnimerge.methods import Statistics

# Elements that a method sees at once: all of its float32 operands then stay in the cache.
_KERNEL_ELEMENTS = 1 << 16


class SliceWorker:
    """Computes slices of a plan's output tensors; one object per thread.

    Args:
        plan: what to do.
        statistics: what the method has to know of the whole model; see `collect_statistics`.
    """

    def __init__(self, plan: MergePlan, statistics: Statistics | None = None) -> None:
        self._plan = plan
        self._statistics = statistics
        self._raw: dict[int, Tensor] = {}
        self._floats: dict[int, Tensor] = {}

    def compute(self, job: TensorJob, start: int, stop: int) -> Tensor:
        """Compute elements ``start:stop`` of an output tensor.

        Args:
            job: the output tensor.
            start: first element.
            stop: one past the last; methods that are not elementwise need the whole tensor.

        Returns:
            A flat tensor in the output dtype, valid until the next call.

        Raises:
            NonFiniteError: if an input holds NaN or infinity, or the result overflows its dtype.
        """
        if not job.merged:
            return self._copy(job, start, stop)
        inputs = [*job.sources, *([job.base] if job.base else [])]
        raw = [
            self._read(number, checkpoint, name, start, stop)
            for number, (checkpoint, name) in enumerate(inputs)
        ]
        if not self._plan.method.elementwise:
            whole = [tensor.float().reshape(job.output.shape) for tensor in raw]
            merged = self._merge(job, whole, raw).flatten()
            return _rounded(job, merged, torch.empty_like(merged, dtype=_dtype(job)))
        result = self._buffer(len(inputs), job.output.dtype, stop - start)
        for begin in range(0, stop - start, _KERNEL_ELEMENTS):
            part = slice(begin, min(begin + _KERNEL_ELEMENTS, stop - start))
            floats = [self._as_float(number, tensor[part]) for number, tensor in enumerate(raw)]
            _rounded(job, self._merge(job, floats, raw), result[part])
        return result

    def _merge(self, job: TensorJob, floats: list[Tensor], raw: list[Tensor]) -> Tensor:
        models = floats[: len(job.sources)]
        base = floats[-1] if job.base else None
        merged = self._plan.method.merge(
            models,
            base,
            job.parameters,
            statistics=self._statistics,
            name=job.output.name,
            seed=self._plan.recipe.seed,
        )
        # One pass in cache; only a non-finite sum leads to the exact, slower look.
        if not torch.isfinite(merged.sum()):
            self._explain_non_finite(job, raw, merged)
        return merged

    def _explain_non_finite(self, job: TensorJob, raw: list[Tensor], merged: Tensor) -> None:
        inputs = [*job.sources, *([job.base] if job.base else [])]
        for (checkpoint, name), tensor in zip(inputs, raw, strict=True):
            if not torch.isfinite(tensor.float()).all():
                raise NonFiniteError(
                    f"tensor {name!r} of {checkpoint.reference} holds NaN or infinity; repair the "
                    "checkpoint, or keep the target's tensor with an override"
                )
        if not torch.isfinite(merged).all():
            raise NonFiniteError(
                f"tensor {job.output.name!r} overflows when merged by {self._plan.method.name}; "
                "use smaller weights or scale"
            )

    def _copy(self, job: TensorJob, start: int, stop: int) -> Tensor:
        target, name = self._plan.target, job.output.name
        kept = self._read(0, target, name, start, stop)
        stored = target.tensors[name].dtype
        checked = is_known(stored) and is_floating(stored) and "finite" not in self._plan.forced
        if checked and torch.isnan(kept.float() if kept.element_size() == 1 else kept).any():
            raise NonFiniteError(
                f"tensor {name!r} of {target.reference} holds NaN; repair the checkpoint, or copy "
                "it as it is with --force finite"
            )
        if stored == job.output.dtype:
            return kept
        return _rounded(job, kept, torch.empty_like(kept, dtype=_dtype(job)))

    def _read(
        self, number: int, checkpoint: Checkpoint, name: str, start: int, stop: int
    ) -> Tensor:
        buffer = self._buffer(number, checkpoint.tensors[name].dtype, stop - start)
        checkpoint.read_into(buffer, name, start)
        return buffer

    def _buffer(self, number: int, dtype: str, elements: int) -> Tensor:
        nbytes = elements * item_size(dtype)
        held = self._raw.get(number)
        if held is None or held.numel() < nbytes:
            held = self._raw[number] = torch.empty(nbytes, dtype=torch.uint8)
        return held[:nbytes].view(torch_dtype(dtype))

    def _as_float(self, number: int, part: Tensor) -> Tensor:
        held = self._floats.get(number)
        if held is None:
            held = self._floats[number] = torch.empty(_KERNEL_ELEMENTS)
        return held[: part.numel()].copy_(part)


def collect_statistics(plan: MergePlan) -> Statistics | None:
    """Gather what the plan's method has to know of the whole model, in bounded memory.

    Args:
        plan: what to do; the recipe's own keywords count, overrides do not.

    Returns:
        The statistics, or None if the method needs none.
    """

    def tensors() -> Iterator[tuple[list[Tensor], Tensor | None]]:
        for job in plan.merged:
            numel = job.output.nbytes // item_size(job.output.dtype)
            for start in range(0, numel, CHUNK_ELEMENTS):
                stop = min(start + CHUNK_ELEMENTS, numel)
                models = [checkpoint.read(name, start, stop) for checkpoint, name in job.sources]
                yield models, job.base[0].read(job.base[1], start, stop) if job.base else None

    return plan.method.collect(tensors, plan.recipe.model_count(), plan.recipe.all_parameters)


def _rounded(job: TensorJob, values: Tensor, into: Tensor) -> Tensor:
    """Round to the output dtype; refuse what its range does not hold."""
    into.copy_(values)
    if job.output.dtype in _NARROW and not torch.isfinite(into.float().sum()):
        overflow = torch.isfinite(values) & ~torch.isfinite(into.float())
        if overflow.any():
            raise NonFiniteError(
                f"tensor {job.output.name!r} overflows {_NARROW[job.output.dtype]}; "
                "set dtype: bfloat16"
            )
    return into


def _dtype(job: TensorJob) -> torch.dtype:
    return torch_dtype(job.output.dtype)


# Types whose range is smaller than bfloat16's. F8_E4M3 has no infinity: torch gives NaN there.
_NARROW = {"F16": "float16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3"}
