"""OptMerge: optimise the merged task vector against interference, without its noise."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import adam_quadratic, is_matrix, svd, task_vectors
from omnimerge.methods._registry import Range, merge_method


@merge_method(
    "optmerge",
    paper="https://arxiv.org/abs/2505.19892",
    family="optimisation",
    needs_base=True,
    select="linear",
)
def optmerge(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    variant: Literal["auto", "lora", "full"] = "auto",
    iterations: Annotated[int, Range(0, 2000)] = 300,
    learning_rate: Annotated[float | None, Range(0.0, 1.0)] = None,
    momentum: Annotated[float, Range(0.0, 1.0)] = 0.9,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Minimise the interference of the merged task vector with every task's main directions.

    L(τ) = Σ_t ‖(τ - τ̂_t) A_tᵀ‖² / ‖τ_t‖²,  A_t = S_k V_kᵀ of τ_t,  k = ⌊min(m, n) / T⌋.
    `lora`: τ̂_t = the rank-k part of τ_t; SGD with momentum from the mean of the τ_t.
    `full`: τ̂_t = the rank-k part of τ_t - τ̄, plus τ̄; Adam from the sum.   θ = θ_base + λ τ

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        variant: `lora` for LoRA experts, `full` for full fine-tuning; `auto` takes `lora` where
            every task vector has at most half of the rank that its shape allows.
        iterations: optimiser steps.
        learning_rate: default: 1e-4 for `lora`, 1e-5 for `full`, as in the paper (§5.1).
        momentum: of SGD; not used by `full`.
        scale: the paper's λ; it searches 0.1, 0.3, 0.5, 0.7, 1.0 and 1.5.

    Returns:
        The merged tensor: float32. Tensors that are no matrices get θ_base + λ · mean_t τ_t.

    Raises:
        MethodError: if there is no base.

    Reference:
        Wei et al. "OptMerge: Unifying Multimodal LLM Capabilities and Modalities via Model
        Merging." ICLR 2026. Equations 1 to 3 and §4.2.

    Differences from the authors' code:
        The steps of SGD with momentum on this quadratic are a polynomial in the eigenvalues of
        C = Σ_t A_tᵀ A_t / ‖τ_t‖²; they are computed in closed form, in float64, where the code
        loops in float16. In `full`, A_t comes from the task vector as it is, as in the code, and
        not from the centred one, as Equation 3 has it. `auto` is ours.
    """
    if base is None:
        raise MethodError("optmerge works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    u, s, vt = svd(tau)
    chosen = variant if variant != "auto" else _variant(s)
    kept = min(base.shape) // len(models)
    norms = tau.flatten(start_dim=1).square().sum(dim=1)
    rows = s[:, :kept, None] * vt[:, :kept]
    weights = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    rows = rows * weights.sqrt()[:, None, None]
    if chosen == "lora":
        centre = (u[:, :, :kept] * s[:, None, :kept]) @ vt[:, :kept]
        rate = 1e-4 if learning_rate is None else learning_rate
        merged = _momentum_sgd(tau.mean(dim=0), centre, rows, iterations, rate, momentum)
    else:
        mean = tau.mean(dim=0)
        u, s, vt = svd(tau - mean)
        centre = (u[:, :, :kept] * s[:, None, :kept]) @ vt[:, :kept] + mean
        rate = 1e-5 if learning_rate is None else learning_rate
        merged = adam_quadratic(tau.sum(dim=0), centre, rows, iterations, rate)
    return base.float() + scale * merged


def _variant(singular_values: Tensor) -> str:
    """`lora` where every task vector is of low rank, up to the rounding of storage types."""
    significant = singular_values > 1e-2 * singular_values[:, :1]
    return "lora" if int(significant.sum(dim=1).max()) * 2 <= singular_values.shape[1] else "full"


def _momentum_sgd(
    start: Tensor, centre: Tensor, rows: Tensor, iterations: int, rate: float, momentum: float
) -> Tensor:
    """The iterate of SGD with momentum on Σ_t ‖(τ - centre_t) rows_tᵀ‖², in closed form.

    The gradient is 2 (τ C - D) with C = Σ rows_tᵀ rows_t and D = Σ centre_t rows_tᵀ rows_t. Along
    an eigenvector of C with eigenvalue λ the distance e to the minimum follows
    v ← μ v + 2 λ e, e ← e - rate · v. With P the eigenvectors as columns, after all steps
    τ = τ_0 + (D C⁺ - τ_0) P diag(1 - e) Pᵀ.
    """
    stacked = rows.flatten(end_dim=1).double()  # (T · k, n), at most min(m, n) rows
    # Right singular vectors of the stack are the eigenvectors of C; the Gram matrix is the smaller.
    values, left = torch.linalg.eigh(stacked @ stacked.T)
    usable = values > values.max().clamp(min=1e-300) * 1e-14
    values, left = values[usable], left[:, usable]
    vectors = stacked.T @ left / values.sqrt()  # (n, rank)
    target = sum(
        c.double() @ (r.double().T @ (r.double() @ vectors))
        for c, r in zip(centre, rows, strict=True)
    )
    error, velocity = torch.ones_like(values), torch.zeros_like(values)
    for _ in range(iterations):
        velocity = momentum * velocity + 2 * values * error
        error = error - rate * velocity
    origin = start.double()
    step = (target / values - origin @ vectors) * (1 - error)
    result: Tensor = origin + step @ vectors.T
    return result.float()
