"""Compute one slice of an output tensor: read it from every input, merge or copy, round once.

Each thread has an object of its own with its buffers. Reusing them matters: fresh megabyte-sized
tensors for every step cost more in page faults than the arithmetic does.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from omnimerge.checkpoint import AdaptedCheckpoint, Checkpoint
from omnimerge.checkpoint.dtypes import is_floating, is_known, item_size, torch_dtype
from omnimerge.engine.knowledge import Buffers, Held, buffer, tensor_statistics
from omnimerge.engine.lane import Lane
from omnimerge.engine.plan import CHUNK_ELEMENTS, MergePlan, TensorJob
from omnimerge.errors import NonFiniteError
from omnimerge.methods import (
    LowRank,
    MergeMethod,
    Place,
    Statistics,
    added,
    depth_factor,
    scaled_by_depth,
)

# Elements that a method that is not fused sees at once: its float32 operands stay in the cache.
_KERNEL_ELEMENTS = 1 << 16


class SliceWorker:
    """Computes slices of a plan's output tensors; one object per thread.

    Args:
        plan: what to do.
        statistics: what the method has to know of the whole model; see `model_statistics`.
        held: inputs that are in memory already; the others are read from their files.
        lane: to the device to compute on; default: the CPU, or where `held` is.
    """

    def __init__(
        self,
        plan: MergePlan,
        statistics: Statistics | None = None,
        *,
        held: Held | None = None,
        lane: Lane | None = None,
    ) -> None:
        self._plan = plan
        self._statistics = statistics
        self._held = held
        self._lane = lane
        self._known: tuple[str, Statistics | None] = ("", None)
        self._raw: Buffers = {}
        self._measured: Buffers = {}
        self._floats: dict[int, Tensor] = {}

    def compute(self, job: TensorJob, start: int, stop: int) -> Tensor:
        """Compute elements ``start:stop`` of an output tensor.

        Args:
            job: the output tensor.
            start: first element.
            stop: one past the last; see `slices_of` for what the method allows.

        Returns:
            A flat tensor in the output dtype, valid until the next call; on the lane's device,
            but for what is copied.

        Raises:
            NonFiniteError: if an input holds NaN or infinity, or the result overflows its dtype.
        """
        if not job.merged:
            return self._copy(job, start, stop)
        result = self._compute(job, start, stop)
        number = bisect_right(job.own, (start, stop)) - 1
        for first, last in job.own[max(0, number) :]:
            if first >= stop:
                break
            low, high = max(first, start), min(last, stop)
            if low < high:
                own = self._plan.target.read(job.output.name, low, high).to(result.device)
                _rounded(job, own, result[low - start : high - start])
        return result

    def forget(self) -> None:
        """Let go of the buffers, which are kept for the next slice otherwise."""
        self._raw.clear()
        self._measured.clear()
        self._floats.clear()

    def _compute(self, job: TensorJob, start: int, stop: int) -> Tensor:
        if (deltas := low_rank_deltas(self._plan, job)) is not None:
            return self._from_factors(job, deltas)
        named = inputs_of(job)
        raw = [
            self._lane.read(checkpoint, name, start, stop)
            if self._lane
            else self._read(number, checkpoint, name, start, stop)
            for number, (checkpoint, name) in enumerate(named)
        ]
        if self._plan.method.slices == "whole":
            return self._whole(job, raw)
        result = buffer(self._raw, len(named), job.output.dtype, stop - start, raw[0].device)
        # On an accelerator there is no cache to stay in, and every call costs.
        cached = result.device.type == "cpu" and self._lane is None
        fused = self._plan.method.fused
        at_once = _KERNEL_ELEMENTS if cached and not fused else stop - start
        step = _step(self._plan.method, job, at_once)
        for begin in range(0, stop - start, step):
            part = slice(begin, min(begin + step, stop - start))
            inputs = [
                tensor[part] if fused else self._as_float(number, tensor[part])
                for number, tensor in enumerate(raw)
            ]
            merged = self._merge(job, inputs, raw, start + begin)
            _rounded(job, merged, result[part])
        return result

    def _whole(self, job: TensorJob, raw: list[Tensor]) -> Tensor:
        floats = [tensor.float().reshape(job.output.shape) for tensor in raw]
        if not all(torch.isfinite(each.sum()) for each in floats):
            self._explain_non_finite(job, raw, floats[0])  # before a decomposition fails on it
        merged = self._merge(job, floats, raw, 0).flatten()
        return _rounded(job, merged, torch.empty_like(merged, dtype=_dtype(job)))

    def _from_factors(self, job: TensorJob, deltas: list[LowRank]) -> Tensor:
        """Merge adapters without multiplying their factors, as far as the method goes."""
        checkpoint, name = job.base  # type: ignore[misc]
        base = checkpoint.read_tensor(name)
        if self._lane:
            there = self._lane.device
            base = base.to(there)
            deltas = [LowRank(each.left.to(there), each.right.to(there)) for each in deltas]
        merged = added(base, merged_delta(self._plan, job, deltas)).flatten()
        if not torch.isfinite(merged).all():
            names = ", ".join(model.reference for model, _ in job.sources)
            raise NonFiniteError(
                f"tensor {job.output.name!r} of {names}, or of their base, holds NaN or infinity"
            )
        return _rounded(job, merged, torch.empty_like(merged, dtype=_dtype(job)))

    def _merge(
        self, job: TensorJob, inputs: list[Tensor], raw: list[Tensor], offset: int
    ) -> Tensor:
        method, recipe = self._plan.method, self._plan.recipe
        if method.slices == "rows":
            inputs = [each.view(-1, *job.output.shape[-1:]) for each in inputs]
        models = inputs[: len(job.sources)]
        base = inputs[-1] if job.base else None
        place = Place(job.output.name, recipe.seed, offset, job.depth)
        known = self._statistics or self._statistics_of(job)
        merged = method.merge(models, base, job.parameters, statistics=known, place=place)
        if recipe.lines and base is not None:
            merged = scaled_by_depth(merged, base, recipe.lines.pair, job.depth)
        # One pass in cache; only a non-finite sum leads to the exact, slower look.
        if not torch.isfinite(merged.sum()):
            self._explain_non_finite(job, raw, merged)
        return merged.flatten() if method.slices == "rows" else merged

    def _statistics_of(self, job: TensorJob) -> Statistics | None:
        """What the method has to know of this tensor; that of the last one asked for is kept."""
        if self._known[0] != job.output.name:
            self._known = (
                job.output.name,
                tensor_statistics(self._plan, job, self._measured, self._held, self._lane),
            )
        return self._known[1]

    def _explain_non_finite(self, job: TensorJob, raw: list[Tensor], merged: Tensor) -> None:
        for (checkpoint, name), tensor in zip(inputs_of(job), raw, strict=True):
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
        held = self._held(checkpoint, name) if self._held else None
        if held is not None:
            return held[start:stop]
        part = buffer(self._raw, number, checkpoint.tensors[name].dtype, stop - start)
        checkpoint.read_into(part, name, start)
        return part

    def _as_float(self, number: int, part: Tensor) -> Tensor:
        held = self._floats.get(number)
        if held is None or held.numel() < part.numel():
            room = max(_KERNEL_ELEMENTS, part.numel())
            held = self._floats[number] = torch.empty(room, device=part.device)
        return held[: part.numel()].copy_(part)


def inputs_of(job: TensorJob) -> list[tuple[Checkpoint, str]]:
    """Return what an output tensor is merged from.

    Args:
        job: the output tensor.

    Returns:
        (Checkpoint, name of a tensor in it): the models', then the base's if there is one.
    """
    return [*job.sources, *([job.base] if job.base else [])]


def low_rank_deltas(plan: MergePlan, job: TensorJob) -> list[LowRank] | None:
    """Return the task vectors of a tensor as factors.

    Args:
        plan: what to do.
        job: the output tensor.

    Returns:
        One per model; None unless the method takes factors, every model is an adapter on the base,
        and each changes this tensor by a product only.
    """
    if not plan.method.low_rank or job.base is None:
        return None
    deltas = []
    for checkpoint, name in job.sources:
        if not isinstance(checkpoint, AdaptedCheckpoint) or checkpoint.base is not job.base[0]:
            return None
        factors = checkpoint.factors(name) if name == job.base[1] else None
        if factors is None:
            return None
        deltas.append(LowRank(*factors))
    return deltas


def merged_delta(plan: MergePlan, job: TensorJob, deltas: list[LowRank]) -> LowRank | Tensor:
    """Merge task vectors that are given as factors.

    Args:
        plan: what to do.
        job: the output tensor.
        deltas: what `low_rank_deltas` returned.

    Returns:
        The merged task vector, LiNeS included.
    """
    place = Place(job.output.name, plan.recipe.seed, 0, job.depth)
    delta = plan.method.merge_low_rank(deltas, job.parameters, place=place)
    if plan.recipe.lines is None:
        return delta
    share = depth_factor(plan.recipe.lines.pair, job.depth)
    return LowRank(share * delta.left, delta.right) if isinstance(delta, LowRank) else share * delta


def slices_of(
    plan: MergePlan, job: TensorJob, elements: int = CHUNK_ELEMENTS
) -> list[tuple[int, int]]:
    """Cut an output tensor into what is read, computed and written at once.

    Args:
        plan: what to do.
        job: the output tensor.
        elements: of a slice, about.

    Returns:
        (first element, one past the last) of every slice, in order.
    """
    numel = job.output.nbytes // item_size(job.output.dtype)
    step = _step(plan.method, job, elements) if job.merged else CHUNK_ELEMENTS
    return [(start, min(start + step, numel)) for start in range(0, numel, step)]


def _step(method: MergeMethod, job: TensorJob, elements: int) -> int:
    """How many elements the method takes at once, at most about `elements` where it may choose."""
    if method.slices == "entries":
        return elements
    numel = job.output.nbytes // item_size(job.output.dtype)
    if method.slices == "whole":
        return max(1, numel)
    width = max(1, job.output.shape[-1] if job.output.shape else 1)
    return width * max(1, elements // width)


def _rounded(job: TensorJob, values: Tensor, into: Tensor) -> Tensor:
    """Round to the output dtype; refuse what its range does not hold."""
    into.copy_(values)
    if job.output.dtype in _NARROW and _overflows(values, into):
        raise NonFiniteError(
            f"tensor {job.output.name!r} overflows {_NARROW[job.output.dtype]}; set dtype: bfloat16"
        )
    return into


def _overflows(values: Tensor, rounded: Tensor) -> bool:
    if rounded.dtype == torch.float8_e4m3fn:
        return bool((values.float().abs() > _ROUNDS_TO_LARGEST).any())
    if torch.isfinite(rounded.float().sum()):
        return False
    return bool((torch.isfinite(values.float()) & ~torch.isfinite(rounded.float())).any())


def _dtype(job: TensorJob) -> torch.dtype:
    return torch_dtype(job.output.dtype)


# Types whose range is smaller than bfloat16's.
_NARROW = {"F16": "float16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn"}
# F8_E4M3 ends at 448 and has no infinity: what is beyond becomes NaN or 448, by torch's version.
_ROUNDS_TO_LARGEST = 464.0
