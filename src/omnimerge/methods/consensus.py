"""Consensus merging: keep the entries that at least two tasks need."""

from collections.abc import Sequence
from typing import Annotated, Literal

from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._kernels import Band, Election, kernels
from omnimerge.methods._ops import equal_weights, task_vectors
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method
from omnimerge.methods._statistics import Trimming, gather

_PAPER = "https://arxiv.org/abs/2405.07813"


@merge_method(
    "consensus_ta",
    paper=_PAPER,
    family="task vectors",
    needs_base=True,
    slices="entries",
    exact=False,  # of a sum over the models
)
def consensus_ta(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    threshold: Annotated[float, Range(0.0, 10.0)] = 0.4,
    consensus: Annotated[int, Range(0, 64)] = 2,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Add the task vectors where enough tasks need the sum.

    τ = Σ_t τ_t;  m_t = 1 where |τ_t| ≥ |τ - τ_t| · λ_t;
    θ = θ_base + α · τ where Σ_t m_t ≥ k, else θ_base

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        threshold: the paper's λ_t, one for all tasks; it chooses among 0.2, 0.3 … 0.6.
        consensus: how many tasks must need an entry, the paper's k; 0 is task arithmetic. Where
            there are fewer models, all of them must.
        scale: the factor α on the merged task vector.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Wang et al. "Localizing Task Information for Improved Model Merging and Compression." ICML
        2024. Equations 3 to 5 (TALL masks and consensus merging).

    Differences from the authors' code:
        λ is one for all tasks, where the code chooses one per task by validation data; the code has
        > for ≥.
    """
    if base is None:
        raise MethodError("consensus_ta works on task vectors and needs a base")
    tau = task_vectors(models, base)
    merged = tau.sum(dim=0)
    return base.float() + scale * _agreed(tau, merged, threshold, consensus)


@merge_method(
    "consensus_ties",
    paper=_PAPER,
    family="task vectors",
    needs_base=True,
    slices="entries",
    statistics=Trimming,
)
def consensus_ties(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.2,
    threshold: Annotated[float, Range(0.0, 10.0)] = 0.4,
    consensus: Annotated[int, Range(0, 64)] = 2,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    threshold_scope: Literal["exact", "tensor", "model"] = "exact",
    statistics: Trimming | None = None,
) -> Float[Tensor, "*shape"]:
    """Take TIES' sum where enough tasks need it.

    τ = the disjoint sum of `ties`;  m_t = 1 where |τ_t| ≥ |τ - τ_t| · λ_t, τ_t being whole;
    θ = θ_base + α · τ where Σ_t m_t ≥ k, else θ_base

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model, in TIES; default: 1 each.
        density: share of entries that TIES keeps per model.
        threshold: the paper's λ_t, one for all tasks; it chooses among 0.2, 0.3 … 0.6.
        consensus: how many tasks must need an entry, the paper's k. Where there are fewer models,
            all of them must.
        scale: the factor α on the merged task vector.
        threshold_scope: over what TIES' largest entries are taken; see `ties`. The code has
            `model`.
        statistics: TIES' thresholds; provided by the caller where a slice is merged.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Wang et al. "Localizing Task Information for Improved Model Merging and Compression." ICML
        2024. Equations 3 to 5, on the task vector of TIES (Yadav et al., NeurIPS 2023).

    Differences from the authors' code:
        As for `consensus_ta`; weights are ours.
    """
    if base is None:
        raise MethodError("consensus_ties works on task vectors and needs a base")
    if statistics is None:
        known = {"density": density, "threshold_scope": threshold_scope, "weights": weights}
        statistics = Trimming(len(models), known)
        gather(statistics, lambda: [(models, base)])
    merged = kernels(base).merge(
        models,
        base,
        equal_weights(weights, len(models)),
        Band(statistics.thresholds[0]),
        Election(mean=False, majority=statistics.majority),
    )
    tau = task_vectors(models, base)
    return base.float() + scale * _agreed(tau, merged, threshold, consensus)


def _agreed(tau: Tensor, merged: Tensor, threshold: float, consensus: int) -> Tensor:
    """The merged task vector where enough tasks need it, else zero."""
    needed = (tau.abs() >= (merged - tau).abs() * threshold).sum(dim=0)
    return merged * (needed >= min(consensus, len(tau)))
