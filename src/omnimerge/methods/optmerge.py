"""OptMerge: optimise the merged task vector against interference, without its noise."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._low_rank import LowRank, joint_space
from omnimerge.methods._ops import (
    adam_quadratic,
    is_matrix,
    main_directions,
    matrix_shape,
    pull_towards,
    task_vectors,
)
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method


class _Problem:
    """The quadratic Σ_t ‖(τ - centre_t) R_tᵀ‖² whose gradient is 2 (τ C - D).

    Args:
        tau: the task vectors, or their cores.
        shape: (m, n) of the task vectors.
        variant: `auto`, `lora` or `full`.
    """

    def __init__(self, tau: Tensor, shape: tuple[int, int], variant: str) -> None:
        rank = min(shape)
        kept = min(rank // len(tau), *tau.shape[1:])
        found = [main_directions(t, kept) for t in tau]
        spread = [int((s > 1e-2 * s[0]).sum()) for _, s, _ in found if len(s)]
        low = max(spread, default=0) * 2 <= rank
        self.variant = variant if variant != "auto" else ("lora" if low else "full")
        self.start = tau.mean(dim=0)
        self._u, self._s = [u for u, _, _ in found], [s[:kept] for _, s, _ in found]
        norms = [float(t.double().square().sum()) for t in tau]
        self._shares = [1 / norm if norm > 0 else 0.0 for norm in norms]
        parts = [r * w**0.5 for (_, _, r), w in zip(found, self._shares, strict=True)]
        self._rows, self._tau = torch.cat(parts), tau

    @property
    def rows(self) -> Tensor:
        """The R_t of all tasks, one below the other, with C = Σ R_tᵀ R_t; float32."""
        return self._rows.float()

    @property
    def pull(self) -> Tensor:
        """D of the variant `full`, float32."""
        centre = []
        for t in self._tau:
            u, _, r = main_directions(t - self.start, len(self._s[0]))
            centre.append((u @ r).float() + self.start)
        return pull_towards(
            torch.stack(centre), self.rows.view(len(centre), len(self._s[0]), self.rows.shape[1])
        )

    def momentum_sgd(self, iterations: int, rate: float | None, momentum: float) -> Tensor:
        """The last iterate of SGD with momentum from the mean, variant `lora`, in closed form.

        Along an eigenvector of C with eigenvalue λ the distance e to the minimum follows
        v ← μ v + 2 λ e, e ← e - rate · v. With P the eigenvectors as columns, after all steps
        τ = τ_0 + (D C⁺ - τ_0) P diag(1 - e) Pᵀ. D P = Σ_t U_t S_t³ V_tᵀ P / ‖τ_t‖².
        """
        # Right singular vectors of the rows are the eigenvectors of C; their Gram is the smaller.
        values, left = torch.linalg.eigh(self._rows @ self._rows.T)
        usable = values > values.max().clamp(min=1e-300) * 1e-14
        values, left = values[usable], left[:, usable]
        vectors = self._rows.T @ left / values.sqrt()  # P: (n, rank)
        inner = (self._rows @ vectors).view(len(self._s), len(self._s[0]), len(values))
        target = torch.zeros(len(self.start), len(values), dtype=torch.float64)
        for u, s, weight, part in zip(self._u, self._s, self._shares, inner, strict=True):
            target += (u * s.square() * weight**0.5) @ part
        error, velocity = torch.ones_like(values), torch.zeros_like(values)
        step = 1e-4 if rate is None else rate
        for _ in range(iterations):
            velocity = momentum * velocity + 2 * values * error
            error = error - step * velocity
        origin = self.start.double()
        moved = (target / values - origin @ vectors) * (1 - error)
        merged: Tensor = origin + moved @ vectors.T
        return merged.float()


def _rate(learning_rate: float | None) -> float:
    """Adam's default."""
    return 1e-5 if learning_rate is None else learning_rate


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
    problem = _Problem(torch.stack(cores), deltas[0].shape, variant)
    if problem.variant == "lora":
        merged = problem.momentum_sgd(iterations, learning_rate, momentum)
        return LowRank(scale * (left @ merged), right)
    start = left @ torch.stack(cores).sum(dim=0) @ right
    pull, rows = left @ problem.pull @ right, problem.rows @ right
    return scale * adam_quadratic(start, pull, rows, iterations, _rate(learning_rate))


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
        C = Σ_t A_tᵀ A_t / ‖τ_t‖²; they are computed in closed form, in float64, where the code
        loops in float16. In `full`, A_t comes from the task vector as it is, as in the code, and
        not from the centred one, as Equation 3 has it. `auto` is ours.
    """
    if base is None:
        raise MethodError("optmerge works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    problem = _Problem(tau, matrix_shape(base), variant)
    if problem.variant == "lora":
        merged = problem.momentum_sgd(iterations, learning_rate, momentum)
    else:
        merged = adam_quadratic(
            tau.sum(dim=0), problem.pull, problem.rows, iterations, _rate(learning_rate)
        )
    return base.float() + scale * merged
