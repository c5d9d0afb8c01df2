"""Steps that several papers share. Everything here is a pure function of tensors.

Shape letters used in this package: ``*shape`` = the shape of the one weight tensor being merged.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.methods._kernels import kernels


def weighted_sum(
    tensors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float]
) -> Float[Tensor, "*shape"]:
    """Return Σ_t w_t x_t in float32, one tensor after the other; nothing is stacked.

    Args:
        tensors: x_t, in any floating-point dtype.
        weights: w_t, one per tensor.

    Returns:
        The sum: float32, a new tensor.
    """
    return kernels(tensors[0]).combine(tensors, None, weights)


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
    held = torch.empty(len(models) * base.numel(), device=base.device)
    for _ in kernels(base).differences(models, base, max(1, base.numel()), held):
        pass  # one block: all entries
    return held.view(len(models), *base.shape)


def scaled_by_depth(
    merged: Float[Tensor, "*shape"],
    base: Float[Tensor, "*shape"],
    lines: tuple[float, float],
    depth: float | None,
) -> Float[Tensor, "*shape"]:
    """Scale a merged task vector by its layer's depth; see `depth_factor`.

    Args:
        merged: θ_base + τ.
        base: θ_base.
        lines: α and β.
        depth: 0 for the first layer to 1 for the last; None outside of the layers.

    Returns:
        θ_base + (α + β · depth) τ, float32.
    """
    origin = base.float()
    return origin.add(merged - origin, alpha=depth_factor(lines, depth))


def depth_factor(lines: tuple[float, float], depth: float | None) -> float:
    """Return LiNeS' factor α + β · depth (Wang et al., ICLR 2025).

    Args:
        lines: α and β.
        depth: 0 for the first layer to 1 for the last; None outside of the layers, as 0.

    Returns:
        The factor on a task vector.
    """
    alpha, beta = lines
    return alpha + beta * (depth or 0.0)


def is_matrix(tensor: Tensor) -> bool:
    """Return whether a tensor has a spectrum: two dimensions and at least one element.

    Args:
        tensor: any tensor.

    Returns:
        True for non-empty matrices. The spectral methods average the other tensors.
    """
    return tensor.ndim == 2 and tensor.numel() > 0


def matrix_shape(tensor: Tensor) -> tuple[int, int]:
    """Return the shape of a matrix.

    Args:
        tensor: (m, n).

    Returns:
        (m, n).
    """
    rows, columns = tensor.shape
    return rows, columns


def svd(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin singular value decomposition U, S, Vᵀ of a matrix or a batch of them.

    Args:
        tensor: (..., m, n).

    Returns:
        U (..., m, r), S (..., r) in descending order and Vᵀ (..., r, n), with r = min(m, n).
    """
    u, s, vt = torch.linalg.svd(tensor, full_matrices=False)
    return u, s, vt


def main_directions(
    tensor: Float[Tensor, "m n"], count: int, *, negligible: float = 0.0
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "k"], Float[Tensor, "k n"]]:
    """Return the first singular directions of a matrix, by an eigenproblem on its smaller side.

    In float64, so that squaring the matrix costs no digit that float32 has. Where only few
    directions matter, a randomised range finder finds them much faster (Halko et al., 2011,
    Algorithm 4.4).

    Args:
        tensor: the matrix τ.
        count: how many directions are wanted, at most min(m, n).
        negligible: directions with s² / ‖τ‖² up to this may be left out; 0: none.

    Returns:
        U_k, the singular values s in descending order, and S_k V_kᵀ = U_kᵀ τ; float64, k ≤ count.
    """
    wide = tensor.shape[0] <= tensor.shape[1]
    matrix = tensor if wide else tensor.T
    values, vectors, other = _few_directions(matrix, negligible) or _all_directions(matrix)
    strengths, vectors, other = values[:count].sqrt(), vectors[:, :count], other[:count]
    if wide:
        return vectors, strengths, other
    scale = strengths[:, None]
    unit = torch.where(scale > 0, other / scale.clamp(min=1e-300), torch.zeros_like(other))
    return unit.T, strengths, scale * vectors.T


def _all_directions(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors Q of τ τᵀ, and Qᵀ τ."""
    exact = matrix.double()
    values, vectors = torch.linalg.eigh(exact @ exact.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    return values, vectors, vectors.T @ exact


def range_basis(
    matrix: Float[Tensor, "m n"], width: int, generator: torch.Generator, *, powers: int
) -> Float[Tensor, "m w"]:
    """Return orthonormal columns that hold a matrix's leading left singular directions.

    Args:
        matrix: float32.
        width: number of columns, more than the directions that are wanted.
        generator: to draw the sketch from.
        powers: how often the matrix and its transpose are applied, to tell close ones apart.

    Returns:
        The basis (Halko et al., 2011, Algorithm 4.4).
    """
    columns = matrix @ torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    for _ in range(powers):
        columns = matrix @ (matrix.T @ torch.linalg.qr(columns).Q)
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _few_directions(matrix: Tensor, negligible: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `_all_directions`, without what is negligible; None if too much is not."""
    total = negligible * float(matrix.double().square().sum())
    generator = torch.Generator().manual_seed(0)
    width = 64
    while total > 0 and 3 * width <= matrix.shape[0]:
        basis = range_basis(matrix, width, generator, powers=1)
        inner = (basis.T @ matrix).double()
        values, turn = torch.linalg.eigh(inner @ inner.T)
        values, turn = values.flip(0).clamp(min=0), turn.flip(1)
        if float(values[-1]) <= total:
            kept = max(1, int((values > total).sum()))
            turn = turn[:, :kept]
            return values[:kept], basis.double() @ turn, turn.T @ inner
        width *= 2
    return None


def significant(values: Float[Tensor, "*batch r"], shape: Sequence[int]) -> Tensor:
    """Return which singular values are above rounding: the numerical rank's usual definition.

    Args:
        values: singular values in descending order.
        shape: (m, n) of the matrix.

    Returns:
        True where the direction is one of the data's, not of rounding.
    """
    floor = torch.finfo(values.dtype).eps * max(shape) * values[..., :1]
    return values > floor


def orthogonalize(columns: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Return the nearest matrix with orthonormal columns (orthogonal Procrustes, by SVD).

    Args:
        columns: any matrix with at least as many rows as columns.

    Returns:
        U Vᵀ of its singular value decomposition U S Vᵀ.
    """
    u, _, vt = svd(columns)
    return u @ vt


def pull_towards(centre: Sequence[Tensor], rows: Sequence[Tensor]) -> Float[Tensor, "m n"]:
    """Return D = Σ_t centre_t rows_tᵀ rows_t, the constant part of the gradient of WUDI's loss.

    Args:
        centre: one centre (m, n) per task.
        rows: one weight matrix (k, n) per task.

    Returns:
        D, float32.
    """
    total = torch.zeros_like(centre[0])
    for c, r in zip(centre, rows, strict=True):
        total += c @ (r.T @ r) if c.shape[1] <= r.shape[0] else (c @ r.T) @ r
    return total


def adam_quadratic(
    start: Float[Tensor, "m n"],
    pull: Float[Tensor, "m n"],
    rows: Float[Tensor, "k n"],
    iterations: int,
    learning_rate: float,
) -> Float[Tensor, "m n"]:
    """Run Adam on Σ_t ‖(τ - centre_t) rows_tᵀ‖² (Kingma and Ba, 2015, Algorithm 1, its defaults).

    The gradient is 2 (τ C - D) with C = Σ rows_tᵀ rows_t and D = Σ centre_t rows_tᵀ rows_t, so a
    step costs one product, whatever the number of tasks.

    Args:
        start: τ before the first step.
        pull: D; see `pull_towards`.
        rows: the rows_t of all tasks, one below the other.
        iterations: number of steps.
        learning_rate: Adam's step size.

    Returns:
        τ after the last step, float32.
    """
    # C is n x n and of rank k at most: take whichever form costs less in a step.
    dense = rows.T @ rows if start.shape[1] <= 2 * rows.shape[0] else None
    tau = start.clone()
    first, second = torch.zeros_like(tau), torch.zeros_like(tau)
    for step in range(1, iterations + 1):
        product = tau @ dense if dense is not None else (tau @ rows.T) @ rows
        gradient = 2 * (product - pull)
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        size = learning_rate / (1 - 0.9**step)
        tau.addcdiv_(first, (second / (1 - 0.999**step)).sqrt_().add_(1e-8), value=-size)
    return tau


def chebyshev(function: Callable[[np.ndarray], np.ndarray], bound: float) -> Sequence[float] | None:
    """Return the Chebyshev coefficients of a smooth function on [0, bound].

    Args:
        function: of an array of numbers.
        bound: end of the interval.

    Returns:
        As few coefficients as hold it to float32's precision; None if 64 are too few.
    """
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    found = np.polynomial.chebyshev.chebfit(nodes, function((nodes + 1) / 2 * bound), 63)
    floor = 1e-9 * np.abs(found).max()
    last = int(np.flatnonzero(np.abs(found) > floor).max(initial=0))
    return found[: last + 1].tolist() if last < 56 else None


def matrix_chebyshev(
    left: Float[Tensor, "m k"],
    matrix: Float[Tensor, "k k"],
    coefficients: Sequence[float],
    bound: float,
) -> Float[Tensor, "m k"]:
    """Return left · f(matrix) for a Chebyshev series f on [0, bound] (Clenshaw's recurrence).

    Args:
        left: a matrix.
        matrix: symmetric, its eigenvalues within [0, bound].
        coefficients: of the series.
        bound: end of the interval.

    Returns:
        The product; one product with `matrix` per coefficient was needed.
    """
    before, last = torch.zeros_like(left), torch.zeros_like(left)
    for coefficient in reversed(coefficients[1:]):
        turned = (last @ matrix) * (2 / bound) - last
        before, last = last, coefficient * left + 2 * turned - before
    turned = (last @ matrix) * (2 / bound) - last
    return coefficients[0] * left + turned - before


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
