"""SWUDI: the minimum of WUDI's loss in closed form, with its noisy directions left alone."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import is_matrix, task_vectors
from omnimerge.methods._registry import Range, merge_method

_PAPER = "https://arxiv.org/abs/2606.07289"
# Eigenvalues below this count as it where they divide.
_FLOOR = 1e-8

RankRule = Literal[
    "participation_sqrt", "participation", "stable_rank", "entropy",
    "cumvar_0.9", "cumvar_0.95", "cumvar_0.99", "none",
]  # fmt: skip
Init = Literal["sum", "mean", "zero"]


@merge_method("swudi", paper=_PAPER, family="optimisation", needs_base=True, select="linear")
def swudi(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    time: Annotated[float, Range(0.0, 1e6)] = 300.0,
    rank_ratio: Annotated[float | None, Range(0.0, 1.0)] = 0.65,
    init: Init = "sum",
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Follow the gradient flow of WUDI's loss for a while, along its main directions only.

    C = Σ_t τ_tᵀ τ_t / ‖τ_t‖² = Q diag(λ) Qᵀ,  D = Σ_t τ_t τ_tᵀ τ_t / ‖τ_t‖²;
    h_k = 1 - exp(-t λ_k) for the first K = ⌈r n⌉ eigenvalues, else 0;
    τ = τ_0 + (D Q - τ_0 Q diag(λ)) diag(h / λ) Qᵀ;  θ = θ_base + scale · τ

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        time: the paper's t; it takes 300 to 1800.
        rank_ratio: the paper's r, the share of eigenvalues that are used; null for all.
        init: τ_0: the `sum` or the `mean` of the task vectors, or `zero`.
        scale: factor on the merged task vector; with `sum` about 1 / T for multimodal LLMs (the
            authors take 0.2 for Qwen2-VL and 0.1 for InternVL2.5 with five experts).

    Returns:
        The merged tensor: float32. Tensors that are no matrices get θ_base + scale · mean_t τ_t.

    Raises:
        MethodError: if there is no base.

    Reference:
        Wei et al. "Closed-Form Spectral Regularization for Multi-Task Model Merging." 2026 (SWUDI).

    Differences from the authors' code:
        None known.
    """
    if base is None:
        raise MethodError("swudi works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    values, vectors, pull = _spectrum(tau)
    gain = 1 - torch.exp(-time * values)
    if rank_ratio is not None:
        gain[math.ceil(rank_ratio * len(values)) :] = 0
    return base.float() + scale * _filtered(tau, init, values, vectors, pull, gain)


@merge_method("aswudi", paper=_PAPER, family="optimisation", needs_base=True, select="linear")
def aswudi(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    rank_rule: RankRule = "participation_sqrt",
    init: Init = "sum",
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Take the minimum of WUDI's loss in as many directions as the spectrum of each matrix has.

    As `swudi`, with h_k = 1 for k ≤ K, else 0, and K from the eigenvalues λ (σ = √λ):
    `participation_sqrt` ⌈(Σσ)² / Σσ²⌉, `participation` ⌈(Σλ)² / Σλ²⌉, `stable_rank`
    ⌈Σλ² / λ_1²⌉, `entropy` ⌈exp(-Σ p log p)⌉ with p = λ / Σλ, `cumvar_x` the fewest whose λ sum
    to the share x, `none` all.

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        rank_rule: how K is chosen; the first is the authors' default.
        init: τ_0: the `sum` or the `mean` of the task vectors, or `zero`.
        scale: factor on the merged task vector; see `swudi`.

    Returns:
        The merged tensor: float32. Tensors that are no matrices get θ_base + scale · mean_t τ_t.

    Raises:
        MethodError: if there is no base.

    Reference:
        Wei et al. "Closed-Form Spectral Regularization for Multi-Task Model Merging." 2026
        (SWUDI-A, ASWUDI in the code).

    Differences from the authors' code:
        Their Gavish-Donoho rule is not here yet.
    """
    if base is None:
        raise MethodError("aswudi works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    values, vectors, pull = _spectrum(tau)
    gain = torch.zeros_like(values)
    gain[: _rank(values, rank_rule)] = 1
    return base.float() + scale * _filtered(tau, init, values, vectors, pull, gain)


def _spectrum(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of C in descending order, its eigenvectors as columns, and D."""
    grams = tau.transpose(1, 2) @ tau
    norms = tau.flatten(start_dim=1).norm(dim=1).square()
    weights = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))[:, None, None]
    values, vectors = torch.linalg.eigh((weights * grams).sum(dim=0))
    pull = (weights * (tau @ grams)).sum(dim=0)
    return values.flip(0).clamp(min=0), vectors.flip(1), pull


def _filtered(
    tau: Tensor, init: str, values: Tensor, vectors: Tensor, pull: Tensor, gain: Tensor
) -> Tensor:
    """τ_0 moved towards the minimum by the share `gain` along every eigenvector.

    All of it in the eigenbasis: forming D - τ_0 C first would lose digits where λ is small.
    """
    start = {"sum": tau.sum(dim=0), "mean": tau.mean(dim=0), "zero": torch.zeros_like(tau[0])}[init]
    ahead = pull @ vectors - (start @ vectors) * values
    return start + (ahead * (gain / values.clamp(min=_FLOOR))) @ vectors.T


def _rank(values: Tensor, rule: str) -> int:
    total = values.sum()
    if rule == "none" or float(total) == 0:
        return len(values)
    if rule.startswith("cumvar_"):
        share = float(rule.removeprefix("cumvar_"))
        return int((values.cumsum(0) / total < share).sum()) + 1
    shares = values[values > 0] / total
    rank = {
        "participation_sqrt": lambda: values.sqrt().sum().square() / total,
        "participation": lambda: total.square() / values.square().sum(),
        "stable_rank": lambda: values.square().sum() / values.max().square(),
        "entropy": lambda: (-(shares * shares.log()).sum()).exp(),
    }[rule]()
    return max(1, min(len(values), math.ceil(float(rank))))
