"""WUDI: minimise the interference of the merged task vector with every task vector."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._low_rank import LowRank
from omnimerge.methods._ops import (
    adam_quadratic,
    is_matrix,
    main_directions,
    pull_towards,
    task_vectors,
)
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method

# Directions with less of ‖τ‖² than this change the result by about 1e-6 of it, if at all.
_NEGLIGIBLE = 1e-7


def _from_factors(
    deltas: Sequence[LowRank],
    *,
    iterations: int = 300,
    learning_rate: float = 1e-5,
    scale: float = 1.0,
) -> Tensor:
    """Merge factors: Adam moves every entry by itself, so τ is dense, but C stays of low rank."""
    start = torch.cat([d.left for d in deltas], dim=1) @ torch.cat([d.right for d in deltas])
    rows = [_normed(delta.row_factor()) for delta in deltas]
    pull = torch.zeros_like(start)
    for delta, row in zip(deltas, rows, strict=True):
        pull += delta.left @ ((delta.right @ row.T) @ row)
    stacked = torch.cat(rows)
    return scale * adam_quadratic(start, pull, stacked, iterations, learning_rate)


def _normed(rows: Tensor) -> Tensor:
    norm = rows.norm()
    return rows / norm if norm > 0 else rows


@merge_method(
    "wudi",
    paper="https://arxiv.org/abs/2503.08099",
    family="optimisation",
    needs_base=True,
    select="linear",
    low_rank=_from_factors,
)
def wudi(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    iterations: Annotated[int, Range(0, 2000)] = 300,
    learning_rate: Annotated[float, Range(0.0, 1.0)] = 1e-5,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Let the merged task vector act like each task's own on that task's inputs.

    L(τ) = Σ_t ‖(τ - τ_t) τ_tᵀ‖² / ‖τ_t‖², minimised by Adam from Σ_t τ_t;  θ = θ_base + λ τ.
    The rows of τ_t stand in for the layer's inputs, which they are combinations of.

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        iterations: steps of Adam.
        learning_rate: of Adam.
        scale: the factor λ on the merged task vector.

    Returns:
        The merged tensor: float32. Tensors that are no matrices get θ_base + λ · mean_t τ_t.

    Raises:
        MethodError: if there is no base.

    Reference:
        Cheng et al. "Whoever Started the Interference Should End It: Guiding Data-Free Model
        Merging via Task Vectors." ICML 2025. Equation 1 of OptMerge (ICLR 2026) restates the loss.

    Differences from the authors' code:
        The gradient is computed as 2 (τ C - D), C and D being summed over the tasks once, which
        gives the same iterates up to rounding. Directions with less than 1e-7 of ‖τ_t‖² are
        left out where these are many, which changes the result by a few 1e-6 of it.
    """
    if base is None:
        raise MethodError("wudi works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    # R_t with R_tᵀ R_t = τ_tᵀ τ_t / ‖τ_t‖², of few rows where τ_t is of low rank.
    found = [main_directions(t, min(t.shape), negligible=_NEGLIGIBLE)[2].float() for t in tau]
    rows = [r / t.norm() if t.any() else r for r, t in zip(found, tau, strict=True)]
    pull, stacked = pull_towards(list(tau), rows), torch.cat(rows)
    merged = adam_quadratic(tau.sum(dim=0), pull, stacked, iterations, learning_rate)
    return base.float() + scale * merged
