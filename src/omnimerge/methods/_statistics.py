"""What a method has to know before it merges: sums and thresholds over a tensor or a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._kernels import block_of, kernels
from omnimerge.methods._ops import equal_weights

Scope = Literal["tensor", "model"]
Ranked = tuple[Sequence[Tensor], Tensor | None]
"""Tensors, and what is subtracted from each of them."""


@runtime_checkable
class Statistics(Protocol):
    """What a method has to know of a tensor, or of a whole model, before it merges.

    In every pass, `measure` is called for all tensors, or slices of them, and may run in several
    threads; `add` gets what it returned, in order, in one thread; `close` ends the pass.
    """

    scope: Scope
    passes: int

    def idle(self, number: int) -> bool:
        """Tell whether a pass, those before it being closed, has nothing to find out.

        Args:
            number: which pass.

        Returns:
            True if `measure` need not be called; `close` is.
        """

    def measure(
        self,
        number: int,
        models: Sequence[Tensor],
        base: Tensor | None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Look at one tensor, or a slice of one.

        Args:
            number: which pass this is, from 0.
            models: one tensor per model, of any floating-point dtype.
            base: the common ancestor's tensor.
            counts: an earlier measurement of the pass. Integers are counted on in it; numbers of
                another kind are left alone.

        Returns:
            What `add` needs; of one shape and dtype throughout a pass. Integers are counts: `add`
            may get the sum of several measurements in one.
        """

    def add(self, number: int, measured: Tensor) -> None:
        """Take in what `measure` returned.

        Args:
            number: which pass this is.
            measured: the measurement.
        """

    def close(self, number: int) -> None:
        """End a pass.

        Args:
            number: which pass this was.
        """


def gather(
    statistics: Statistics, tensors: Callable[[], Iterable[tuple[Sequence[Tensor], Tensor | None]]]
) -> None:
    """Run all passes over tensors that are in memory.

    Args:
        statistics: is filled.
        tensors: called once per pass; gives (models, base) for every tensor.
    """
    for number in range(statistics.passes):
        for models, base in tensors() if not statistics.idle(number) else ():
            statistics.add(number, statistics.measure(number, models, base))
        statistics.close(number)


def task_vector_blocks(models: Sequence[Tensor], base: Tensor | None) -> Iterator[Tensor]:
    """Give the task vectors of a tensor in blocks that fit a cache.

    Args:
        models: one tensor per model.
        base: the common ancestor's tensor.

    Yields:
        (models, entries), float32, contiguous; the same memory every time.

    Raises:
        MethodError: if there is no base.
    """
    if base is None:
        raise MethodError("statistics of task vectors need a base")
    yield from kernels(base).differences(models, base, *block_of(models))


class Magnitudes:
    """The exact k-th largest magnitudes of every model's task vector, in bounded memory.

    float32 magnitudes are ordered as their bit patterns are, so a first histogram over the upper 16
    of their 31 bits finds the bin that holds the wanted one, a second the value within that bin.
    The first also tells the bin's smallest value, whose other bits are zero, from the rest: where
    it is the wanted one, as for most differences of bfloat16 numbers, the second is not needed.

    Args:
        models: number of models.
        ranks: number of entries -> the wanted k, one or several, each from 0 (nothing reaches it)
            to that number.
        scope: what the ranks are taken over.
    """

    passes = 2

    def __init__(self, models: int, ranks: Callable[[int], Sequence[int]], scope: Scope) -> None:
        self.scope = scope
        self._ranks = ranks
        self._models = models
        self._counted: dict[int, Tensor] = {}
        self._bins = torch.zeros(0)
        self._within: dict[tuple[int, int], int] = {}
        self.thresholds = torch.zeros(0)

    def idle(self, number: int) -> bool:
        """Whether the first pass has told all."""
        return number == 1 and bool((self._bins == _NONE).all())

    def measure(
        self,
        number: int,
        models: Sequence[Tensor],
        base: Tensor | None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Count magnitudes by their upper bits (pass 0), or by their lower in the bins (pass 1)."""
        if counts is None:
            shape = (self._models, 1 << 17) if number == 0 else (*self._bins.shape, 1 << 15)
            counts = torch.zeros(shape, dtype=torch.int64, device=models[0].device)
        for ranked, origin in self.ranked(models, base):
            if number == 0:
                kernels(models[0]).count_upper(ranked, origin, counts)
            else:
                kernels(models[0]).count_lower(ranked, origin, self._bins, counts)
        return counts

    def ranked(self, models: Sequence[Tensor], base: Tensor | None) -> Iterator[Ranked]:
        """Give what is ranked: the task vectors, or, piece by piece, what a method overrides."""
        if base is None:
            raise MethodError("statistics of task vectors need a base")
        yield models, base

    def add(self, number: int, measured: Tensor) -> None:
        """Sum the counts."""
        counted = self._counted.get(number)
        self._counted[number] = measured.cpu() if counted is None else counted + measured.cpu()

    def close(self, number: int) -> None:
        """Turn the counts into the bins, or the values; MethodError if one is not finite."""
        if number == 0:
            upper = self._counted.pop(0, torch.zeros(self._models, 1, dtype=torch.int64))
            if upper[:, _INFINITE:].any():
                raise MethodError("a task vector holds NaN or infinity")
            wanted = self._ranks(int(upper[0].sum()))
            self.thresholds = torch.full((len(wanted), self._models), float("inf"))
            self._bins = torch.full(self.thresholds.shape, _NONE)
            for r, rank in enumerate(wanted):
                for t, row in enumerate(upper) if rank else ():
                    place, within = _from_above(row, rank)
                    if place % 2:  # not the smallest of its bin
                        self._bins[r, t], self._within[r, t] = place // 2, within
                    else:
                        self._found(r, t, place // 2 << 15)
            return
        lower = self._counted.pop(1, torch.zeros(0))
        for (r, t), rank in self._within.items():
            low, _ = _from_above(lower[r, t], rank)
            self._found(r, t, int(self._bins[r, t]) << 15 | low)

    def _found(self, r: int, t: int, bits: int) -> None:
        self.thresholds[r, t] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)


class Trimming(Magnitudes):
    """TIES' thresholds, and the sign that most entries elect once the task vectors are trimmed.

    Args:
        models: number of models.
        parameters: `density`, `weights` and `threshold_scope` of the method.
    """

    passes = 3

    def __init__(self, models: int, parameters: Mapping[str, Any]) -> None:
        density, rule = float(parameters["density"]), parameters["threshold_scope"]
        scope: Scope = "model" if rule == "model" else "tensor"
        super().__init__(models, lambda numel: [_kept(density, numel, rule)], scope)
        self._weights = equal_weights(parameters.get("weights"), models)
        self._signs = 0

    def measure(
        self,
        number: int,
        models: Sequence[Tensor],
        base: Tensor | None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Count magnitudes (passes 0 and 1), or the signs of the trimmed sum (pass 2)."""
        if number < 2:
            return super().measure(number, models, base, counts)
        low = self.thresholds[0]
        signs = kernels(models[0]).count_signs(models, base, self._weights, low)
        return torch.tensor(signs) if counts is None else counts.add_(signs)

    def add(self, number: int, measured: Tensor) -> None:
        """Sum what was counted."""
        if number < 2:
            super().add(number, measured)
        else:
            self._signs += int(measured)

    def close(self, number: int) -> None:
        """End a pass."""
        if number < 2:
            super().close(number)

    @property
    def majority(self) -> float:
        """The sign of most entries: 1, -1, or 0."""
        return float((self._signs > 0) - (self._signs < 0))


def _kept(density: float, numel: int, rule: str) -> int:
    """How many entries TIES keeps, by each published rule."""
    if rule == "exact":
        return int(density * numel)
    if rule == "tensor":
        return min(numel, numel - int(numel * (1 - density)) + 1)
    return min(numel, int(density * numel) + 1)


# Where counting by upper bits puts the first magnitude that is not finite.
_INFINITE = 0x7F800000 >> 15 << 1
# No bin to look into.
_NONE = -1


def _from_above(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest entry, and its rank from above within that bin."""
    first, width = 0, len(counts)
    while width > 1:  # many bins together first
        step = max(1, width // 256)
        above = counts[first : first + width].view(-1, step).sum(dim=1).flip(0).cumsum(0)
        position = int(torch.searchsorted(above, rank))
        rank -= int(above[position - 1]) if position else 0
        first, width = first + (len(above) - 1 - position) * step, step
    return first, rank
