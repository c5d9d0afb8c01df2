"""Consensus merging: keep the entries that at least two tasks need."""

from collections.abc import Sequence
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import task_vectors
from omnimerge.methods._registry import Range, merge_method


@merge_method(
    "consensus_ta",
    paper="https://arxiv.org/abs/2405.07813",
    family="task vectors",
    needs_base=True,
    elementwise=True,
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
        λ is one for all tasks, where the code may choose one per task by validation data.
    """
    if base is None:
        raise MethodError("consensus_ta works on task vectors and needs a base")
    tau = task_vectors(models, base)
    merged = tau.sum(dim=0)
    needed = (tau.abs() >= (merged - tau).abs() * threshold).sum(dim=0)
    return base.float() + scale * merged * (needed >= min(consensus, len(models)))
