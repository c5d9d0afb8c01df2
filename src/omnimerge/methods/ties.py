"""TIES: trim, elect sign, disjoint merge."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import equal_weights, kth_magnitude, task_vectors
from omnimerge.methods._registry import Range, Statistics, merge_method


class _ModelThresholds:
    """The trimming thresholds of whole models, and the sign that most entries elect.

    Two histograms over the bits of the magnitudes give the exact k-th largest one in bounded
    memory: float32 magnitudes are ordered as their bit patterns are, so the first finds the bin of
    the upper 16 bits, the second the value within it.
    """

    passes = 3

    def __init__(self, models: int, parameters: Mapping[str, Any]) -> None:
        self._density = float(parameters["density"])
        self._weights = parameters["weights"]
        self._upper = torch.zeros(models, 1 << 16, dtype=torch.int64)
        self._lower = torch.zeros(models, 1 << 15, dtype=torch.int64)
        self._bins = [0] * models
        self._ranks = [0] * models
        self.thresholds = [0.0] * models
        self.majority = 0.0

    def see(self, number: int, models: Sequence[Tensor], base: Tensor | None) -> None:
        """Count magnitudes (passes 0 and 1) or elected signs (pass 2) of one tensor."""
        if base is None:
            raise MethodError("ties works on task vectors and needs a base")
        tau = (
            task_vectors(models, base).flatten(start_dim=1)
            if base.ndim
            else (task_vectors(models, base)[:, None])
        )
        if number == 2:
            trimmed = _trim(tau, self.thresholds)
            self.majority += float(_weighted(trimmed, self._weights).sum(dim=0).sign().sum())
            return
        bits = tau.abs().view(torch.int32)
        for t, row in enumerate(bits):
            if number == 0:
                self._upper[t] += torch.bincount(row >> 15, minlength=1 << 16)
            else:
                inside = row[(row >> 15) == self._bins[t]] & 0x7FFF
                self._lower[t] += torch.bincount(inside, minlength=1 << 15)

    def close(self, number: int) -> None:
        """Turn the counts of a pass into the bin, or the value, of the k-th largest magnitude."""
        for t in range(len(self.thresholds)):
            if number == 0:
                count = int(self._upper[t].sum())
                rank = min(int(self._density * count) + 1, count)
                self._bins[t], self._ranks[t] = _from_above(self._upper[t], rank)
            elif number == 1:
                low, _ = _from_above(self._lower[t], self._ranks[t])
                bits = torch.tensor((self._bins[t] << 15) | low, dtype=torch.int32)
                self.thresholds[t] = float(bits.view(torch.float32))


def _statistics(models: int, parameters: Mapping[str, Any]) -> Statistics | None:
    return (
        _ModelThresholds(models, parameters) if parameters["threshold_scope"] == "model" else None
    )


@merge_method(
    "ties",
    paper="https://arxiv.org/abs/2306.01708",
    family="task vectors",
    needs_base=True,
    statistics=_statistics,
)
def ties(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.2,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    merge: Literal["mean", "sum"] = "mean",
    threshold_scope: Literal["exact", "tensor", "model"] = "exact",
    statistics: _ModelThresholds | None = None,
) -> Float[Tensor, "*shape"]:
    """Keep the largest changes, agree on a sign, merge what agrees.

    τ̂_t = τ_t where |τ_t| is among the largest, else 0;  γ = sign(Σ_t w_t τ̂_t);
    τ = mean (or sum) of {w_t τ̂_t : sign τ̂_t = γ};  θ = θ_base + λ τ

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each, as in the paper.
        density: share of entries kept per model; the paper's k = 20 % is 0.2.
        scale: the paper's λ.
        merge: `mean` divides by the weights of the models that agree, entry by entry, as in the
            paper; `sum` does not.
        threshold_scope: over what the largest are taken, n entries: `exact` keeps ⌊density · n⌋ of
            each tensor; `tensor` n - ⌊(1 - density) n⌋ + 1 of each tensor, as OptMerge's code for
            Qwen2-VL does; `model` ⌊density · n⌋ + 1 of the whole model, as AdaMMS's code and the
            authors' do. Entries as large as the last one kept are kept too.
        statistics: thresholds of the whole model, provided where `threshold_scope` is `model`.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Yadav et al. "TIES-Merging: Resolving Interference When Merging Models." NeurIPS 2023.
        Algorithm 1.

    Differences from the authors' code:
        Weights are ours. Where the trimmed entries cancel exactly, the sign that most entries of
        the scope elect decides, as there; `exact` takes it per tensor.
    """
    if base is None:
        raise MethodError("ties works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if statistics is not None:
        trimmed = _trim(tau, statistics.thresholds)
        majority = statistics.majority
    else:
        kept = _kept(density, base.numel(), threshold_scope)
        trimmed = _trim(tau, [kth_magnitude(t, kept) for t in tau])
        majority = float(_weighted(trimmed, weights).sum(dim=0).sign().sum())
    weighted = _weighted(trimmed, weights)
    elected = weighted.sum(dim=0).sign()
    elected = torch.where(elected == 0, torch.full_like(elected, _sign(majority)), elected)
    agrees = weighted * elected > 0
    merged = (weighted * agrees).sum(dim=0)
    if merge == "mean":
        total = _weighted(agrees.float(), weights).sum(dim=0)
        merged = merged / torch.where(total == 0, torch.ones_like(total), total)
    return base.float() + scale * merged


def _sign(value: float) -> float:
    return float(value > 0) - float(value < 0)


def _kept(density: float, numel: int, scope: str) -> int:
    if scope == "exact":
        return int(density * numel)
    return min(numel, numel - int(numel * (1 - density)) + 1)


def _trim(tau: Tensor, thresholds: Sequence[float]) -> Tensor:
    limits = torch.tensor(list(thresholds), dtype=torch.float32)
    return tau * (tau.abs() >= limits.reshape(-1, *[1] * (tau.ndim - 1)))


def _weighted(tau: Tensor, weights: Sequence[float] | None) -> Tensor:
    shares = torch.tensor(list(equal_weights(weights, len(tau))), dtype=torch.float32)
    return shares.reshape(-1, *[1] * (tau.ndim - 1)) * tau


def _from_above(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest entry, and its rank within that bin."""
    above = counts.flip(0).cumsum(0)
    if not len(counts) or int(above[-1]) == 0:
        return 0, 1
    position = int(torch.searchsorted(above, torch.tensor(max(rank, 1))))
    before = int(above[position - 1]) if position else 0
    return len(counts) - 1 - position, rank - before
