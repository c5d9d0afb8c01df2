"""SWUDI: the minimum of WUDI's loss in closed form, with its noisy directions left alone."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import is_matrix, matrix_shape, task_vectors
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method

_PAPER = "https://arxiv.org/abs/2606.07289"
# Eigenvalues below this count as it where they divide.
_FLOOR = 1e-8

RankRule = Literal[
    "participation_sqrt", "participation", "stable_rank", "entropy", "gavish_donoho",
    "cumvar_0.9", "cumvar_0.95", "cumvar_0.99", "none",
]  # fmt: skip
Init = Literal["sum", "mean", "zero"]


@merge_method(
    "swudi", paper=_PAPER, family="optimisation", needs_base=True, select="linear", low_rank="joint"
)
def swudi(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    time: Annotated[float, Range(0.0, 1e6)] = 300.0,
    rank_ratio: Annotated[float | None, Range(0.0, 1.0)] = 0.65,
    init: Init = "sum",
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    full_shape: tuple[int, int] | None = None,
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
        full_shape: (m, n) where the models are cores of larger matrices; provided by the caller.

    Returns:
        The merged tensor: float32. Tensors that are no matrices get θ_base + scale · mean_t τ_t.

    Raises:
        MethodError: if there is no base.

    Reference:
        Wei et al. "Closed-Form Spectral Regularization for Multi-Task Model Merging." 2026 (SWUDI).

    Differences from the authors' code:
        Where m T is clearly less than n, only the m T eigenvectors that the task vectors span are
        looked for, in float64; along the others nothing moves.
    """
    if base is None:
        raise MethodError("swudi works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    _, columns = full_shape or matrix_shape(base)

    def gain(values: Tensor) -> Tensor:
        found = 1 - torch.exp(-time * values)
        if rank_ratio is not None:
            found[math.ceil(rank_ratio * columns) :] = 0
        return found

    return base.float() + scale * _moved(tau, init, gain)


@merge_method(
    "aswudi",
    paper=_PAPER,
    family="optimisation",
    needs_base=True,
    select="linear",
    low_rank="joint",
)
def aswudi(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    rank_rule: RankRule = "participation_sqrt",
    init: Init = "sum",
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    full_shape: tuple[int, int] | None = None,
) -> Float[Tensor, "*shape"]:
    """Take the minimum of WUDI's loss in as many directions as the spectrum of each matrix has.

    As `swudi`, with h_k = 1 for k ≤ K, else 0, and K from the eigenvalues λ (σ = √λ):
    `participation_sqrt` ⌈(Σσ)² / Σσ²⌉, `participation` ⌈(Σλ)² / Σλ²⌉, `stable_rank`
    ⌈Σλ² / λ_1²⌉, `entropy` ⌈exp(-Σ p log p)⌉ with p = λ / Σλ, `cumvar_x` the fewest whose λ sum
    to the share x, `gavish_donoho` the number of σ above ω · median(σ), `none` all.

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        rank_rule: how K is chosen; the first is the authors' default.
        init: τ_0: the `sum` or the `mean` of the task vectors, or `zero`.
        scale: factor on the merged task vector; see `swudi`.
        full_shape: (m, n) where the models are cores of larger matrices; provided by the caller.

    Returns:
        The merged tensor: float32. Tensors that are no matrices get θ_base + scale · mean_t τ_t.

    Raises:
        MethodError: if there is no base.

    Reference:
        Wei et al. "Closed-Form Spectral Regularization for Multi-Task Model Merging." 2026
        (SWUDI-A, ASWUDI in the code).

    Differences from the authors' code:
        As for `swudi`. `gavish_donoho` follows the code: n values σ = √λ, none below 1e-4, their
        lower median, β = min(m, n) / max(m, n) and ω = √(2 (β + 1) + 8 β / (β + 1 + √(β² + 14 β +
        1))) / μ with μ = √((1 - β)² + β), or √(2 + √3) for square ones. (That μ is not the
        median of the Marchenko-Pastur law, which Gavish and Donoho divide by.)
    """
    if base is None:
        raise MethodError("aswudi works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    shape = full_shape or matrix_shape(base)

    def gain(values: Tensor) -> Tensor:
        found = torch.zeros_like(values)
        found[: _rank(values, rank_rule, shape)] = 1
        return found

    return base.float() + scale * _moved(tau, init, gain)


def _moved(tau: Tensor, init: str, gain: Callable[[Tensor], Tensor]) -> Tensor:
    """τ_0 moved towards the minimum by the share `gain(λ)` along every eigenvector of C.

    C is n x n and has rank m T at most. Where that is clearly less than n, the Gram matrix of the
    stacked rows is decomposed, else C itself, in the order and precision of the authors' code,
    since rounding is amplified by 1 / λ.
    """
    share = {"sum": 1.0, "mean": 1 / len(tau), "zero": 0.0}[init]
    tasks, m, n = tau.shape
    if tasks * m <= 0.75 * n:
        return _moved_by_rows(tau, share, gain)
    norms = tau.flatten(start_dim=1).norm(dim=1).square()
    weights = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))[:, None, None]
    grams = tau.transpose(1, 2) @ tau
    values, vectors = torch.linalg.eigh((weights * grams).sum(dim=0))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    pull = (weights * (tau @ grams)).sum(dim=0)
    start = share * tau.sum(dim=0)
    # All of it in the eigenbasis: forming D - τ_0 C first would lose digits where λ is small.
    ahead = pull @ vectors - (start @ vectors) * values
    moved: Tensor = start + (ahead * (gain(values) / values.clamp(min=_FLOOR))) @ vectors.T
    return moved


def _moved_by_rows(tau: Tensor, share: float, gain: Callable[[Tensor], Tensor]) -> Tensor:
    """With R_t = τ_t / ‖τ_t‖ and G = R Rᵀ = L diag(λ) Lᵀ the eigenvectors of C are Rᵀ L / √λ.

    So τ = τ_0 + E L diag(h / λ) Lᵀ R, E_t = (τ_t - τ_0) R_tᵀ, which is made of blocks of G.
    """
    tasks, m, _ = tau.shape
    norms = tau.flatten(start_dim=1).double().norm(dim=1)
    rows = (tau / norms.clamp(min=1e-30).float()[:, None, None]).double()
    gram = tau.new_empty(tasks, m, tasks, m, dtype=torch.float64)
    for i in range(tasks):
        for j in range(i, tasks):
            block = rows[i] @ rows[j].T
            gram[i, :, j], gram[j, :, i] = block, block.T
    start = torch.einsum("s,sitj->itj", share * norms, gram)  # τ_0 R_tᵀ
    own = torch.stack([norms[t] * gram[t, :, t] for t in range(tasks)], dim=1)
    values, left = torch.linalg.eigh(gram.view(tasks * m, tasks * m))
    usable = values > values.max().clamp(min=1e-300) * 1e-12
    values, left = values[usable].flip(0), left[:, usable].flip(1)
    ahead = (own - start).reshape(m, tasks * m) @ left
    inner = (ahead * (gain(values) / values)) @ left.T
    moved: Tensor = share * tau.sum(dim=0) + inner.float() @ rows.flatten(end_dim=1).float()
    return moved


def _rank(values: Tensor, rule: str, shape: tuple[int, int]) -> int:
    total = values.sum()
    if rule == "none" or float(total) == 0:
        return len(values)
    if rule.startswith("cumvar_"):
        share = float(rule.removeprefix("cumvar_"))
        return int((values.cumsum(0) / total < share).sum()) + 1
    if rule == "gavish_donoho":
        return max(1, _above_noise(values, shape))
    shares = values[values > 0] / total
    rank = {
        "participation_sqrt": lambda: values.sqrt().sum().square() / total,
        "participation": lambda: total.square() / values.square().sum(),
        "stable_rank": lambda: values.square().sum() / values.max().square(),
        "entropy": lambda: (-(shares * shares.log()).sum()).exp(),
    }[rule]()
    return max(1, min(len(values), math.ceil(float(rank))))


def _above_noise(values: Tensor, shape: tuple[int, int]) -> int:
    """How many √λ are above ω · median, the median taken over all n of them."""
    columns = shape[1]
    beta = min(shape) / max(shape)
    strengths = values.clamp(min=_FLOOR).sqrt()
    missing = strengths.new_full((columns - len(strengths),), _FLOOR**0.5)
    median = torch.cat([strengths, missing]).median()
    root = math.sqrt(beta * beta + 14 * beta + 1)
    optimal = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))
    middle = math.sqrt((1 - beta) ** 2 + beta) if beta < 0.9999 else math.sqrt(2 + math.sqrt(3))
    return int((strengths > optimal / middle * median).sum())
