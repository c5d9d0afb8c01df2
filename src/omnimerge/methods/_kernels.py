"""What element-wise methods do with every entry: compiled by numba, or in plain torch.

Both forms take the tensors in the dtype that they are stored in, and give the same numbers (the
tests compare them). The plain form serves tensors that are not on the CPU, and machines without
numba. A slice is one call: threads that come back to the interpreter for every block wait for each
other more than they compute.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._random import Stream

# Entries of a block whose float32 operands stay in a core's cache together.
_BLOCK = 1 << 15


@dataclass(frozen=True, slots=True)
class Band:
    """Keep what is within [low, high] in magnitude, one number per model each."""

    low: Tensor
    high: Tensor | None = None

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """Both limits, float32."""
        none = torch.full_like(self.low, float("inf"))
        return self.low, none if self.high is None else self.high


@dataclass(frozen=True, slots=True)
class Draw:
    """Keep entries with probability `density`, divided by it."""

    stream: Stream
    density: float


@dataclass(frozen=True, slots=True)
class DrawByRank:
    """Keep entries with probability `density` ± `epsilon` / 2, by their magnitude's rank in a row.

    They are divided by it; of equal magnitudes, the later has the higher rank.
    """

    stream: Stream
    density: float
    epsilon: float


@dataclass(frozen=True, slots=True)
class Election:
    """Keep what has the sign of the weighted sum.

    Attributes:
        mean: divide by the weights of what is kept.
        majority: the sign where the sum is zero: 1, -1, or 0 for none.
    """

    mean: bool
    majority: float = 0.0


Left = Band | Draw | DrawByRank | None
"""What is left of the task vectors; None: everything."""


class Plain:
    """The kernels in plain torch.

    They work on τ_t = models_t - base in float32, one tensor per model and the base, all of one
    shape and of any floating-point dtypes; without a base, on the models themselves.
    """

    def differences(
        self, models: Sequence[Tensor], base: Tensor | None, step: int, held: Tensor
    ) -> Iterator[Tensor]:
        """Give τ, (models, entries), so many entries at a time; in `held`, every time the same."""
        flat = [model.reshape(-1) for model in models]
        origin = base.reshape(-1) if base is not None else None
        for start in range(0, len(flat[0]), step):
            part = slice(start, min(start + step, len(flat[0])))
            tau = held[: len(flat) * (part.stop - start)].view(len(flat), -1)
            for row, model in zip(tau, flat, strict=True):
                row.copy_(model[part])
                if origin is not None:
                    row.sub_(origin[part].float())
            yield tau

    def combine(
        self, models: Sequence[Tensor], base: Tensor | None, weights: Sequence[float]
    ) -> Tensor:
        """Give base + Σ_t w_t τ_t; without a base, Σ_t w_t models_t. A product is not rounded."""
        if base is None:
            total = torch.mul(models[0].float(), weights[0])
            for model, weight in zip(models[1:], weights[1:], strict=True):
                total.add_(model.float(), alpha=weight)
            return total
        origin = base.float()
        total = origin.clone()
        for model, weight in zip(models, weights, strict=True):
            total.add_(model.float() - origin, alpha=weight)
        return total

    def count_upper(self, models: Sequence[Tensor], base: Tensor | None, counts: Tensor) -> None:
        """Count magnitudes by the upper 16 of their 31 bits, and whether the lower are zero.

        In counts, (models, 2^17): a pair for every value of the upper bits, lower ones zero first.
        """
        for tau in self._blocks(models, base):
            for t, row in enumerate(tau.abs().view(torch.int32)):
                place = (row >> 15) * 2 + ((row & 0x7FFF) != 0)
                counts[t] += torch.bincount(place, minlength=1 << 17)

    def count_lower(
        self, models: Sequence[Tensor], base: Tensor | None, bins: Tensor, counts: Tensor
    ) -> None:
        """Count those in `bins`, (ranks, models), by their lower bits, (ranks, models, 2^15).

        A bin of -1 holds none.
        """
        for tau in self._blocks(models, base):
            for t, row in enumerate(tau.abs().view(torch.int32)):
                for r in range(len(bins)):
                    inside = row[(row >> 15) == bins[r, t]] & 0x7FFF
                    counts[r, t] += torch.bincount(inside, minlength=1 << 15)

    def count_signs(
        self, models: Sequence[Tensor], base: Tensor | None, weights: Sequence[float], low: Tensor
    ) -> int:
        """How many more entries of Σ w τ are positive than negative; those below `low` are zero."""
        blocks = self._blocks(models, base)
        return sum(
            int(_sum(_weighted(_left(tau, Band(low)), weights)).sign().sum()) for tau in blocks
        )

    def merge(
        self,
        models: Sequence[Tensor],
        base: Tensor | None,
        weights: Sequence[float],
        left: Left = None,
        election: Election | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Give base + scale · Σ_t w_t τ̂_t of what is left of the τ_t, and elected; in float32.

        Without a scale, the sum alone. The product with the scale is not rounded.
        """
        count, shape = models[0].numel(), models[0].shape
        tau = models[0].new_empty((len(models), *shape), dtype=torch.float32)
        for _ in self.differences(models, base, max(1, count), tau.view(-1)):
            pass  # one block: all entries
        weighted = _weighted(_left(tau, left), weights)
        total = _sum(weighted)
        if election is not None:
            total = _elected(weighted, weights, total, election)
        return total if scale is None or base is None else base.float().add(total, alpha=scale)

    def _blocks(self, models: Sequence[Tensor], base: Tensor | None) -> Iterator[Tensor]:
        yield from self.differences(models, base, *block_of(models))


class Compiled(Plain):
    """The kernels compiled by numba; see `Plain`.

    Raises:
        ImportError: if numba is not installed.
        RuntimeError: if there is nowhere to cache what is compiled.
    """

    def __init__(self) -> None:
        from omnimerge.methods import _loops

        self._loops = _loops

    def differences(
        self, models: Sequence[Tensor], base: Tensor | None, step: int, held: Tensor
    ) -> Iterator[Tensor]:
        """Give τ, block by block."""
        memory, (source, _kept) = held.numpy(), _source(models, base)
        for start in range(0, models[0].numel(), step):
            count = min(step, models[0].numel() - start)
            tau = memory[: len(models) * count].reshape(len(models), count)
            self._loops.differences(source, start, tau)
            yield torch.from_numpy(tau)

    def combine(
        self, models: Sequence[Tensor], base: Tensor | None, weights: Sequence[float]
    ) -> Tensor:
        """Give the sum."""
        source, _kept = _source(models, base)
        out = torch.empty(models[0].shape)
        self._loops.combine(source, _floats(weights, len(models)), out.view(-1).numpy())
        return out

    def count_upper(self, models: Sequence[Tensor], base: Tensor | None, counts: Tensor) -> None:
        """Count by the upper bits."""
        source, _kept = _source(models, base)
        self._loops.count_upper(source, counts.numpy())

    def count_lower(
        self, models: Sequence[Tensor], base: Tensor | None, bins: Tensor, counts: Tensor
    ) -> None:
        """Count by the lower bits."""
        source, _kept = _source(models, base)
        self._loops.count_lower(source, bins.numpy(), counts.numpy())

    def count_signs(
        self, models: Sequence[Tensor], base: Tensor | None, weights: Sequence[float], low: Tensor
    ) -> int:
        """Count the signs of the sum."""
        source, _kept = _source(models, base)
        return int(self._loops.count_signs(source, low.numpy(), _floats(weights, len(models))))

    def merge(
        self,
        models: Sequence[Tensor],
        base: Tensor | None,
        weights: Sequence[float],
        left: Left = None,
        election: Election | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Give the sum of what is left, or the base with it."""
        loops, none = self._loops, np.empty(0, np.float32)
        source, _kept = _source(models, base)
        out = torch.empty(models[0].shape)
        draw = left if isinstance(left, (Draw, DrawByRank)) else Draw(Stream(0), 1.0)
        keys = np.asarray(draw.stream.keys(len(models)), dtype=np.int64).view(np.uint64)
        first, density = draw.stream.offset, np.float32(draw.density)
        elected = election or Election(mean=False)
        how = (election is not None, elected.mean, np.float32(elected.majority))
        rest = (keys, _floats(weights, len(models)), how, scale is not None, np.float32(scale or 0))
        if isinstance(left, DrawByRank):
            by_rank = (first, density, np.float32(left.epsilon), _width(models[0]))
            loops.merge_rows(source, by_rank, *rest, out.view(-1).numpy())
            return out
        limits = left.limits if isinstance(left, Band) else ()
        low, high = (limit.numpy() for limit in limits) if limits else (none, none)
        kind = {Band: loops.A_BAND, Draw: loops.A_DRAW}.get(type(left), loops.EVERYTHING)
        numbers = (low, high, first, density)
        loops.merge(source, kind, numbers, *rest, out.view(-1).numpy())
        return out


def kernels(tensor: Tensor) -> Plain:
    """Return the fastest kernels for a tensor.

    Args:
        tensor: what they will be used on.

    Returns:
        The compiled ones on the CPU, else the plain ones.
    """
    usable = tensor.device.type == "cpu" and tensor.numel() > 0
    return (_compiled() if usable else None) or Plain()


def block_of(models: Sequence[Tensor]) -> tuple[int, Tensor]:
    """Choose how many entries are worked on at a time, and give memory for their task vectors.

    Args:
        models: one tensor per model.

    Returns:
        Entries, and a flat tensor for so many of every model. Memory that is used again: fresh
        tensors cost more in page faults than the arithmetic does.
    """
    count = models[0].numel()
    # On an accelerator there is no cache to stay in, and every call costs.
    step = max(1, min(_BLOCK, count) if models[0].device.type == "cpu" else count)
    return step, torch.empty(len(models) * step, device=models[0].device)


@lru_cache(maxsize=1)
def _compiled() -> Plain | None:
    try:
        return Compiled()
    except (ImportError, RuntimeError):  # RuntimeError: nowhere to cache what is compiled
        return None


def _left(tau: Tensor, left: Left) -> Tensor:
    """What is left of task vectors, (models, *shape), in place."""
    if isinstance(left, Band):
        column = (-1, *[1] * (tau.ndim - 1))
        magnitude = tau.abs()
        low, high = (limit.to(tau.device).view(column) for limit in left.limits)
        return tau.mul_((magnitude >= low) & (magnitude <= high))
    if isinstance(left, Draw):
        drawn = left.stream.uniform(len(tau), tau.shape[1:], tau.device)
        return tau.mul_(drawn < left.density).div_(_number(left.density or 1.0, tau))
    if isinstance(left, DrawByRank):
        width = _width(tau[0])
        rows = tau.view(len(tau), -1, width)
        ranks = rows.abs().argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        centred = (ranks.float() + 0.5) / _number(width, tau) - 0.5
        keep = (left.density + left.epsilon * centred).clamp(0, 1)
        drawn = left.stream.uniform(len(tau), rows.shape[1:], tau.device)
        rows.mul_(drawn < keep).div_(keep.clamp(min=1e-12))
    return tau


def _weighted(tau: Tensor, weights: Sequence[float]) -> Tensor:
    for row, weight in zip(tau, weights, strict=True):
        row.mul_(weight)
    return tau


def _sum(weighted: Tensor) -> Tensor:
    total = weighted[0].clone()
    for row in weighted[1:]:
        total += row
    return total


def _elected(
    weighted: Tensor, weights: Sequence[float], total: Tensor, election: Election
) -> Tensor:
    elected = total.sign().masked_fill(total == 0, election.majority)
    merged, used = torch.zeros_like(total), torch.zeros_like(total)
    for row, weight in zip(weighted, weights, strict=True):
        agrees = row * elected > 0
        merged += row * agrees
        used += weight * agrees
    if election.mean:
        merged /= used.masked_fill(used == 0, 1.0)
    return merged


def _number(value: float, beside: Tensor) -> Tensor:
    """A divisor on a tensor's device: there, dividing by a Python number takes its reciprocal."""
    return beside.new_full((), value)


def _width(tensor: Tensor) -> int:
    """Entries in a row."""
    return max(1, tensor.shape[-1]) if tensor.ndim else 1


def _source(models: Sequence[Tensor], base: Tensor | None) -> tuple[Any, list[Tensor]]:
    """What `_loops` reads, and the tensors that have to live so long."""
    if len({each.numel() for each in [*models, *([] if base is None else [base])]}) > 1:
        raise MethodError("the tensors have different shapes")  # and would be read beyond their end
    one = len({model.dtype for model in models}) == 1
    kept, kinds, shifts = map(
        list, zip(*(_words(model if one else model.float()) for model in models), strict=True)
    )
    addresses = np.array([each.data_ptr() for each in kept], dtype=np.int64)
    origin, kind, shift = (0, kinds[0], shifts[0])
    if base is not None:
        numbers, kind, shift = _words(base)
        kept.append(numbers)
        origin = numbers.data_ptr()
    count = models[0].numel()
    return (addresses, kinds[0], shifts[0], origin, kind, shift, count), kept


def _words(tensor: Tensor) -> tuple[Tensor, Any, np.uint32]:
    """Numbers side by side, and how to read them: the type and shift of `_loops`' sources."""
    flat = tensor.detach().reshape(-1).contiguous()
    if flat.dtype == torch.bfloat16:
        return flat, np.empty(0, np.uint16), np.uint32(16)
    return flat.float(), np.empty(0, np.uint32), np.uint32(0)


def _floats(weights: Sequence[float], models: int) -> Any:
    if len(weights) != models:
        raise MethodError(f"there are {len(weights)} weights for {models} models")
    return np.asarray(weights, dtype=np.float32)
