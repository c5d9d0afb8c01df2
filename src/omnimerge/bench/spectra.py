"""Numbers that say what a task vector looks like: its spectrum, and how its entries spread."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from omnimerge.methods import LowRank

SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of min(m, n) for which the energy is given; OptMerge keeps one in as many as experts."""

_DECADES, _BINS = (-12, 3), 10  # of the histogram: powers of ten, bins in each
_CHUNK = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spectrum(_Strict):
    """The singular values s_1 ≥ s_2 ≥ … of one task vector, summed up.

    Attributes:
        numerical_rank: how many exceed s_1 · max(m, n) · 2⁻²³, numpy's rule for float32.
        stable_rank: Σ s_i² / s_1².
        effective_rank: exp(-Σ p_i ln p_i) with p_i = s_i / Σ s_j (Roy and Vetterli, 2007).
        rank_99: the smallest k whose first k hold 99 % of Σ s_i².
        energy: share of Σ s_i² in the first k = ⌈share · min(m, n)⌉, for each of `SHARES`.
    """

    numerical_rank: int
    stable_rank: float
    effective_rank: float
    rank_99: int
    energy: tuple[float, ...]


class Spread(_Strict):
    """How the magnitudes of one task vector's entries are spread.

    Attributes:
        shares: of all entries, one per bin; what lies outside of the bins is in the outermost.
        zeros: share of entries that are exactly zero; in no bin.
        mean: of the magnitudes.
        rms: root of their mean square.
        skewness: third standardised moment of the magnitudes; above 0: the long tail is right.
        modes: peaks of the histogram, smoothed over three bins, that rise by a tenth at least.
    """

    shares: tuple[float, ...]
    zeros: float
    mean: float
    rms: float
    skewness: float
    modes: int


def spectrum(delta: Tensor | LowRank) -> Spectrum | None:
    """Sum up the singular values of a task vector.

    Args:
        delta: of any shape of two dimensions at least, flattened behind the first; or factors.

    Returns:
        The summary; None where the task vector is zero.
    """
    values = singular_values(delta)
    if not len(values) or float(values[0]) == 0:
        return None
    shape = delta.shape if isinstance(delta, LowRank) else delta.flatten(1).shape
    energy = values.square()
    total = float(energy.sum())
    held = energy.cumsum(0) / total
    shares = values / values.sum()
    entropy = float(-(shares * shares.clamp(min=1e-300).log()).sum())
    tops = [min(len(values), math.ceil(share * min(shape) - 1e-9)) for share in SHARES]
    return Spectrum(
        numerical_rank=int((values > values[0] * max(shape) * 2.0**-23).sum()),
        stable_rank=total / float(energy[0]),
        effective_rank=math.exp(entropy),
        rank_99=int((held < 0.99 * (1 - 1e-12)).sum()) + 1,
        energy=tuple(min(1.0, float(held[k - 1])) for k in tops),
    )


def singular_values(delta: Tensor | LowRank) -> Tensor:
    """Return the singular values of a task vector, by an eigenproblem on its smaller side.

    In float64, so that what is left of rounding lies below the float32 weights' own.

    Args:
        delta: a matrix, or factors.

    Returns:
        float64, descending; of factors as many as their inner side.
    """
    if isinstance(delta, LowRank):
        if not delta.left.shape[1]:
            return torch.zeros(0, dtype=torch.float64)
        left = torch.linalg.qr(delta.left.double()).R
        right = torch.linalg.qr(delta.right.double().T).R
        core: Tensor = torch.linalg.svdvals(left @ right.T)
        return core
    matrix = delta.flatten(1).double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
    return values


def dot(a: Tensor | LowRank, b: Tensor | LowRank) -> float:
    """Return the inner product of two task vectors of one tensor.

    Args:
        a: the one, dense or as factors.
        b: the other, of the same form.

    Returns:
        Σ a_ij b_ij, summed in float64.
    """
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        inner = (a.left.double().T @ b.left.double()) * (a.right.double() @ b.right.double().T)
        return float(inner.sum())
    left, right = (x.dense() if isinstance(x, LowRank) else x for x in (a, b))
    return math.fsum(
        float(torch.dot(x.double(), y.double()))
        for x, y in zip(_chunks(left), _chunks(right), strict=True)
    )


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    return torch.split(tensor.flatten(), _CHUNK)


class Histogram:
    """Magnitudes of entries, counted by powers of ten, and their moments."""

    def __init__(self) -> None:
        self.counts = [0] * (len(EDGES) - 1)
        self._zeros, self._entries, self._sums = 0, 0, torch.zeros(3, dtype=torch.float64)

    def add(self, delta: Tensor) -> None:
        """Count the entries of a tensor.

        Args:
            delta: the tensor.
        """
        flat = delta.flatten()
        counts = torch.zeros(len(self.counts), dtype=torch.float64)
        for start in range(0, len(flat), _CHUNK):
            magnitudes = flat[start : start + _CHUNK].double().abs()
            self._sums += torch.stack([magnitudes.pow(p).sum() for p in (1, 2, 3)])
            positive = magnitudes[magnitudes > 0]
            self._zeros += len(magnitudes) - len(positive)
            place = ((positive.log10() - _DECADES[0]) * _BINS).floor().long()
            place = place.clamp(0, len(self.counts) - 1)
            counts += torch.bincount(place, minlength=len(self.counts))
        self._entries += len(flat)
        self.counts = [a + int(b) for a, b in zip(self.counts, counts.tolist(), strict=True)]

    def finish(self, first: int, last: int) -> Spread:
        """Sum up.

        Args:
            first: the first bin to give.
            last: the last one.

        Returns:
            Shares and moments.
        """
        count = max(1, self._entries)
        mean, square, cube = (float(each) / count for each in self._sums)
        variance = max(0.0, square - mean**2)
        third = cube - 3 * mean * square + 2 * mean**3
        inside = self.counts[first : last + 1]
        inside[0] += sum(self.counts[:first])
        inside[-1] += sum(self.counts[last + 1 :])
        shares = tuple(each / count for each in inside)
        return Spread(
            shares=shares,
            zeros=self._zeros / count,
            mean=mean,
            rms=math.sqrt(square),
            skewness=third / variance**1.5 if variance > 1e-12 * square else 0.0,
            modes=modes(shares),
        )


EDGES = [10 ** (_DECADES[0] + i / _BINS) for i in range((_DECADES[1] - _DECADES[0]) * _BINS + 1)]


def modes(shares: Sequence[float]) -> int:
    """Count the peaks of a histogram.

    Args:
        shares: one per bin.

    Returns:
        How many maxima, smoothed over three bins, stand above the valleys beside them by a tenth
        of the highest peak.
    """
    padded = [0.0] * 3 + list(shares) + [0.0] * 3
    smooth = [sum(padded[i : i + 3]) / 3 for i in range(len(padded) - 2)]
    least, found = 0.1 * max(smooth), 0
    low = high = 0.0  # the last valley, and the highest since
    rising = True
    for value in smooth:
        if rising:
            high = max(high, value)
            if high - low >= least > 0 and high - value >= least:
                found, rising, low = found + 1, False, value
        else:
            low = min(low, value)
            if value - low >= least:
                rising, high = True, value
    return found
