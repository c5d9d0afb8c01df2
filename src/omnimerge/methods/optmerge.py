"""OptMerge: optimise the merged task vector against interference, without its noise."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._low_rank import LowRank, joint_space
from omnimerge.methods._ops import (
    adam_quadratic,
    chebyshev,
    is_matrix,
    main_directions,
    matrix_chebyshev,
    matrix_shape,
    pull_towards,
    task_vectors,
)
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method

# Share of the distance to the minimum that is left, by eigenvalue.
LeftOver = Callable[[np.ndarray], np.ndarray]


class _Problem:
    """The quadratic Σ_t ‖(τ - centre_t) R_tᵀ‖² whose gradient is 2 (τ C - D).

    Args:
        tau: the task vectors, or their cores.
        shape: (m, n) of the task vectors.
        variant: `auto`, `lora` or `full`.
        negligible: see `main_directions`.
    """

    def __init__(
        self, tau: Tensor, shape: tuple[int, int], variant: str, negligible: float
    ) -> None:
        rank = min(shape)
        kept = min(rank // len(tau), *tau.shape[1:])
        found = [main_directions(t, kept, negligible=negligible) for t in tau]
        spread = [int((s > 1e-2 * s[0]).sum()) for _, s, _ in found if len(s)]
        widest = max(spread, default=0)
        full = widest * 2 > rank or (widest == kept > 0 and _full_rank(tau, rank))
        self.variant = variant if variant != "auto" else ("full" if full else "lora")
        self.start = tau.mean(dim=0)
        self._tau, self._kept, self._negligible = tau, kept, negligible
        norms = [float(t.double().square().sum()) for t in tau]
        shares = [norm**-0.5 if norm > 0 else 0.0 for norm in norms]
        # R_t = S_k V_kᵀ / ‖τ_t‖, and low_t R_tᵀ = U_k S_k² / ‖τ_t‖ of the variant `lora`.
        self._parts = [r.float() * w for (_, _, r), w in zip(found, shares, strict=True)]
        self.rows = torch.cat(self._parts)
        pulls = [u * s.square() * w for (u, s, _), w in zip(found, shares, strict=True)]
        self._pulls = torch.cat(pulls, dim=1)

    @property
    def pull(self) -> Tensor:
        """D of the variant `full`, float32."""
        centre = []
        for t in self._tau:
            u, _, r = main_directions(t - self.start, self._kept, negligible=self._negligible)
            centre.append((u @ r).float() + self.start)
        return pull_towards(centre, self._parts)

    def momentum_sgd(self, left_over: LeftOver) -> Tensor:
        """The last iterate of SGD with momentum from the mean, variant `lora`, in closed form.

        With R the rows of all tasks and G = R Rᵀ it is τ = τ_0 + E q(G) R, where
        E_t = (low_t - τ_0) R_tᵀ and q(λ) = (1 - e(λ)) / λ, e(λ) being the share of the distance to
        the minimum that is left along an eigenvector of eigenvalue λ. q is smooth, so that a short
        Chebyshev series does; where it is not (large rates), G is decomposed.
        """
        gram = self.rows @ self.rows.T
        ahead = self._pulls.float() - self.start @ self.rows.T
        # The largest eigenvalue is at most the largest sum of a row's magnitudes.
        bound = float(gram.abs().sum(dim=1).max()) if gram.numel() else 0.0
        if bound == 0:
            return self.start.clone()
        series = chebyshev(lambda x: (1 - left_over(x)) / x, bound)
        if series is None:
            values, vectors = torch.linalg.eigh(gram.double())
            usable = values > values.max() * 1e-7
            values, vectors = values[usable], vectors[:, usable]
            known = values.cpu().numpy()
            share = torch.from_numpy((1 - left_over(known)) / known).to(values.device)
            inner = ((ahead.double() @ vectors) * share) @ vectors.T
        else:
            inner = matrix_chebyshev(ahead, gram, series, bound)
        moved: Tensor = self.start + inner.float() @ self.rows
        return moved


def _left_over(iterations: int, rate: float, momentum: float) -> LeftOver:
    """e(λ): v ← μ v + 2 λ e, e ← e - rate · v, from e = 1."""

    def left_over(values: np.ndarray) -> np.ndarray:
        error, velocity = np.ones_like(values), np.zeros_like(values)
        for _ in range(iterations):
            velocity = momentum * velocity + 2 * values * error
            error = error - rate * velocity
        return error

    return left_over


def _full_rank(tau: Tensor, rank: int) -> bool:
    """Whether a task vector has more than half of the rank that its shape allows."""
    every = [main_directions(t, min(t.shape))[1] for t in tau]
    return any(int((s > 1e-2 * s[0]).sum()) * 2 > rank for s in every if len(s))


def _negligible(left_over: LeftOver, directions: int) -> float:
    """The share of ‖τ‖² below which a direction moves the result by less than 1e-6 of it."""
    shares = np.logspace(-12, 0, 97)
    moved = (1 - left_over(shares)) * np.sqrt(shares * max(1, directions))
    fine = np.flatnonzero(np.abs(moved) > 1e-6)
    return float(shares[fine[0] - 1]) if len(fine) and fine[0] else 0.0


def _rates(learning_rate: float | None) -> tuple[float, float]:
    """The learning rates of SGD (`lora`) and of Adam (`full`)."""
    return (1e-4, 1e-5) if learning_rate is None else (learning_rate, learning_rate)


def _from_factors(
    deltas: Sequence[LowRank],
    *,
    variant: str = "auto",
    iterations: int = 300,
    learning_rate: float | None = None,
    momentum: float = 0.9,
    scale: float = 1.0,
) -> LowRank | Tensor:
    """Merge factors on their cores; Adam moves every entry by itself, so that needs dense ones."""
    left, cores, right = joint_space(deltas)
    problem = _Problem(torch.stack(cores), deltas[0].shape, variant, 0.0)
    sgd_rate, adam_rate = _rates(learning_rate)
    if problem.variant == "lora":
        merged = problem.momentum_sgd(_left_over(iterations, sgd_rate, momentum))
        return LowRank(scale * (left @ merged), right)
    start = left @ torch.stack(cores).sum(dim=0) @ right
    pull, rows = left @ problem.pull @ right, problem.rows @ right
    return scale * adam_quadratic(start, pull, rows, iterations, adam_rate)


@merge_method(
    "optmerge",
    paper="https://arxiv.org/abs/2505.19892",
    family="optimisation",
    needs_base=True,
    select="linear",
    low_rank=_from_factors,
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
        C = Σ_t A_tᵀ A_t / ‖τ_t‖²; it is evaluated at once, where the code loops in float16. Where
        directions around the k-th move the result by less than 1e-6 of it, the A_t come from a
        randomised range finder; in `full` those with less than 1e-7 of ‖τ_t‖² are left out, which
        changes the result by a few 1e-6 of it. There, A_t comes from the task vector as it is,
        as in the code, and not from the centred one, as Equation 3 has it. `auto` is ours.
    """
    if base is None:
        raise MethodError("optmerge works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    sgd_rate, adam_rate = _rates(learning_rate)
    left_over = _left_over(iterations, sgd_rate, momentum)
    negligible = _negligible(left_over, min(base.shape))
    if variant != "lora":  # Adam moves every entry by the same amount: less is negligible
        negligible = min(negligible, 1e-7)
    problem = _Problem(tau, matrix_shape(base), variant, negligible)
    if problem.variant == "lora":
        merged = problem.momentum_sgd(left_over)
    else:
        merged = adam_quadratic(tau.sum(dim=0), problem.pull, problem.rows, iterations, adam_rate)
    return base.float() + scale * merged
