"""Steps that several papers share. Everything here is a pure function of tensors.

Shape letters used in this package: ``*shape`` = the shape of the one weight tensor being merged.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def weighted_sum(
    tensors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float]
) -> Float[Tensor, "*shape"]:
    """Return Σ_t w_t x_t in float32, one tensor at a time so that nothing is stacked.

    Args:
        tensors: x_t, in any floating-point dtype.
        weights: w_t, one per tensor.

    Returns:
        The sum: float32, a new tensor.
    """
    total = torch.mul(tensors[0].float(), weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.float(), alpha=weight)
    return total


def equal_weights(weights: Sequence[float] | None, count: int) -> Sequence[float]:
    """Return `weights`, or one for every model where none were given.

    Args:
        weights: what the caller gave.
        count: number of models.

    Returns:
        One weight per model.
    """
    return [1.0] * count if weights is None else weights


def task_vectors(
    models: Sequence[Float[Tensor, "*shape"]], base: Float[Tensor, "*shape"]
) -> Float[Tensor, "models *shape"]:
    """Stack τ_t = θ_t - θ_base for every model t, in float32 (Ilharco et al., 2023, §2).

    Args:
        models: the fine-tuned tensors.
        base: the common ancestor's tensor.

    Returns:
        The task vectors: float32, one per model along the first dimension.
    """
    origin = base.float()
    return torch.stack([model.float() - origin for model in models])


def is_matrix(tensor: Tensor) -> bool:
    """Return whether a tensor has a spectrum: two dimensions and at least one element.

    Args:
        tensor: any tensor.

    Returns:
        True for non-empty matrices. The spectral methods average the other tensors.
    """
    return tensor.ndim == 2 and tensor.numel() > 0


def svd(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin singular value decomposition U, S, Vᵀ of a matrix or a batch of them.

    Args:
        tensor: (..., m, n).

    Returns:
        U (..., m, r), S (..., r) in descending order and Vᵀ (..., r, n), with r = min(m, n).
    """
    u, s, vt = torch.linalg.svd(tensor, full_matrices=False)
    return u, s, vt


def orthogonalize(columns: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Return the nearest matrix with orthonormal columns (orthogonal Procrustes, by SVD).

    Args:
        columns: any matrix with at least as many rows as columns.

    Returns:
        U Vᵀ of its singular value decomposition U S Vᵀ.
    """
    u, _, vt = svd(columns)
    return u @ vt


def adam_quadratic(
    start: Float[Tensor, "m n"],
    centre: Float[Tensor, "models m n"],
    rows: Float[Tensor, "models k n"],
    iterations: int,
    learning_rate: float,
) -> Float[Tensor, "m n"]:
    """Run Adam on Σ_t ‖(τ - centre_t) rows_tᵀ‖² (Kingma and Ba, 2015, Algorithm 1, its defaults).

    The gradient is 2 (τ C - D) with C = Σ rows_tᵀ rows_t and D = Σ centre_t rows_tᵀ rows_t, so a
    step costs one product, whatever the number of tasks.

    Args:
        start: τ before the first step.
        centre: one centre per task.
        rows: one weight matrix per task.
        iterations: number of steps.
        learning_rate: Adam's step size.

    Returns:
        τ after the last step, float32.
    """
    stacked = rows.flatten(end_dim=1)
    pull = sum(
        c @ (r.T @ r) if c.shape[1] <= r.shape[0] else (c @ r.T) @ r
        for c, r in zip(centre, rows, strict=True)
    )
    # C is n x n and of rank T·k at most: take whichever form costs less in a step.
    dense = stacked.T @ stacked if start.shape[1] <= 2 * stacked.shape[0] else None
    tau = start.clone()
    first, second = torch.zeros_like(tau), torch.zeros_like(tau)
    for step in range(1, iterations + 1):
        product = tau @ dense if dense is not None else (tau @ stacked.T) @ stacked
        gradient = 2 * (product - pull)
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        size = learning_rate / (1 - 0.9**step)
        tau.addcdiv_(first, (second / (1 - 0.999**step)).sqrt_().add_(1e-8), value=-size)
    return tau


def kth_magnitude(tensor: Tensor, k: int) -> float:
    """Return the k-th largest magnitude of a tensor, without sorting it.

    Args:
        tensor: any floating-point tensor.
        k: from 0 to the number of elements.

    Returns:
        The magnitude; infinity for k = 0, so that nothing reaches it.
    """
    count = tensor.numel()
    if k == 0 or count == 0:
        return float("inf")
    return float(tensor.abs().flatten().kthvalue(count - k + 1).values)


def disjoint_mean(
    tau: Float[Tensor, "models *shape"], weights: Sequence[float] | None
) -> Float[Tensor, "*shape"]:
    """Average, entry by entry, what agrees with the sign of the weighted sum (Yadav et al., 2023).

    Args:
        tau: sparse task vectors.
        weights: one weight per model; default: 1 each.

    Returns:
        The weighted mean of the entries that agree; zero where none does.
    """
    shares = torch.tensor(list(equal_weights(weights, len(tau))), dtype=torch.float32)
    shares = shares.reshape(-1, *[1] * (tau.ndim - 1))
    weighted = shares * tau
    agrees = weighted * weighted.sum(dim=0) > 0
    total = (shares * agrees).sum(dim=0)
    return (weighted * agrees).sum(dim=0) / torch.where(total == 0, torch.ones_like(total), total)
