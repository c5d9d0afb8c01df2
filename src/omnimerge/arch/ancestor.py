"""The ancestor test: do two language models descend from the same weights?

Names and shapes cannot tell a fine-tuned sibling from a foreign model of the same size, nor a
swapped gate and up projection. The cosine of mapped matrices can: descendants of one model stay
close to it (well above 0.9 in published fine-tuned models), while independent matrices of n
entries have a cosine of about ±1/√n.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omnimerge.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

MEDIAN_LIMIT = 0.5
SINGLE_LIMIT = 0.1

_SAMPLES = 4096
_SAMPLE_ELEMENTS = 1 << 15  # small enough for torch not to spread it over threads


@dataclass(frozen=True, slots=True)
class Ancestor:
    """Cosines between mapped matrices of two checkpoints, in [-1, 1].

    Attributes:
        cosines: (target tensor, cosine) for every sampled matrix.
        one_zero: matrices that are zero on one side only.
        both_zero: matrices that are zero on both.
    """

    cosines: tuple[tuple[str, float], ...]
    one_zero: tuple[str, ...] = ()
    both_zero: tuple[str, ...] = ()

    @property
    def median(self) -> float | None:
        """Median cosine, or None where nothing could be sampled."""
        return statistics.median(c for _, c in self.cosines) if self.cosines else None

    @property
    def lowest(self) -> tuple[str, float] | None:
        """The tensor with the smallest cosine."""
        return min(self.cosines, key=lambda pair: pair[1]) if self.cosines else None

    def refusal(self) -> str | None:
        """Return why the pair has no common ancestor, or None if it may have one."""
        if self.one_zero:
            return (
                f"{len(self.one_zero)} sampled matrices are zero on one side only, such as "
                f"{self.one_zero[0]!r}: a file may be incomplete; check the checkpoint, or go on "
                "with --force ancestor"
            )
        if self.median is None or self.lowest is None:
            return None
        name, low = self.lowest
        if self.median < MEDIAN_LIMIT:
            return (
                f"the language models share no ancestor: the median cosine of {len(self.cosines)} "
                f"matrices is {self.median:.3f} (below {MEDIAN_LIMIT}); "
                "merge fine-tunes of one LLM, or go on with --force ancestor"
            )
        if low < SINGLE_LIMIT:
            return (
                f"tensor {name!r} has no common ancestor (cosine {low:.3f}) while the others do "
                f"(median {self.median:.3f}): it may be swapped or from another model; "
                "check the checkpoint, or go on with --force ancestor"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return `cosine_median`, `cosine_min` and `sampled`, for JSON."""
        return {
            "cosine_median": self.median,
            "cosine_min": self.lowest[1] if self.lowest else None,
            "sampled": len(self.cosines),
        }


@dataclass(frozen=True, slots=True)
class Sample:
    """Elements of two tensors that correspond.

    Attributes:
        label: the target's tensor, for messages.
        ours: (checkpoint, tensor) of one side.
        theirs: (checkpoint, tensor) of the other, of the same shape.
        start: first element of the range from whose middle the sample is taken.
        stop: one past its last.
    """

    label: str
    ours: tuple[Checkpoint, str]
    theirs: tuple[Checkpoint, str]
    start: int
    stop: int


def measure_ancestor(samples: Sequence[Sample]) -> Ancestor:
    """Compute the cosine of corresponding elements, from a slice of each sample.

    Args:
        samples: what to compare; at most some 4,096 of them, evenly spread, are.

    Returns:
        The cosines, and which slices are zero.
    """
    step = max(1, -(-len(samples) // _SAMPLES))
    found, one_zero, both_zero = [], [], []
    for sample in samples[::step]:
        start = max(sample.start, (sample.start + sample.stop - _SAMPLE_ELEMENTS) // 2)
        stop = min(sample.stop, start + _SAMPLE_ELEMENTS)
        ours, theirs = (
            checkpoint.read(name, start, stop).float()
            for checkpoint, name in (sample.ours, sample.theirs)
        )
        zero = [not bool(each.any()) for each in (ours, theirs)]
        if all(zero):
            both_zero.append(sample.label)
        elif any(zero):
            one_zero.append(sample.label)
        elif (value := cosine(ours, theirs)) is not None:
            found.append((sample.label, value))
    return Ancestor(tuple(found), tuple(one_zero), tuple(both_zero))


def same_slice(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Return whether two tensors of a checkpoint agree in a slice.

    Args:
        checkpoint: the checkpoint.
        one: a tensor name.
        other: a tensor of the same shape.

    Returns:
        True if the sampled elements are equal.
    """
    return bool((_slice(checkpoint, one) == _slice(checkpoint, other)).all())


def _slice(checkpoint: Checkpoint, name: str) -> Tensor:
    """Elements from the middle of a tensor, the same ones in every checkpoint, in float32."""
    numel = checkpoint.meta(name).numel
    start = max(0, (numel - _SAMPLE_ELEMENTS) // 2)
    return checkpoint.read(name, start, min(numel, start + _SAMPLE_ELEMENTS)).float()


def cosine(a: Tensor, b: Tensor) -> float | None:
    """Return the cosine of two tensors.

    Args:
        a: a tensor.
        b: another of the same shape.

    Returns:
        A number in [-1, 1]; None where one is zero or not finite, which says nothing here and is
        reported by the merge itself.
    """
    norm = float(a.norm()) * float(b.norm())
    if not 0 < norm < float("inf"):
        return None
    return float((a * b).sum()) / norm
