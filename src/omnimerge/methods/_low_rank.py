"""Task vectors of low rank, such as LoRA adapters, as products of two factors.

Most spectral methods see singular values and subspaces only: with orthonormal columns in U and V,
f(U M_1 Vᵀ, U M_2 Vᵀ, …) = U f(M_1, M_2, …) Vᵀ. So they are run on the small cores M_t, whose sides
are the ranks of all experts together, and never on a dense matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.methods._ops import range_basis, svd


@dataclass(frozen=True)
class LowRank:
    """A task vector τ = left · right, for tensors that have m rows and n columns when flattened.

    Attributes:
        left: (m, r), float32.
        right: (r, n), float32; r may be 0, for a tensor that the expert did not change.
    """

    left: Float[Tensor, "m r"]
    right: Float[Tensor, "r n"]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Float[Tensor, "m n"]:
        """Multiply the factors.

        Returns:
            τ, float32.
        """
        return self.left @ self.right

    def isfinite(self) -> bool:
        """Whether neither factor holds NaN or infinity."""
        return bool(torch.isfinite(self.left).all() and torch.isfinite(self.right).all())

    def row_factor(self) -> Float[Tensor, "k n"]:
        """Return R with Rᵀ R = τᵀ τ and as few rows as the rank.

        Returns:
            R, float32.
        """
        upper: Tensor = torch.linalg.qr(self.left.double()).R
        return upper.float() @ self.right


def added(base: Tensor, delta: LowRank | Tensor) -> Tensor:
    """Add a task vector to the base's tensor.

    Args:
        base: of any shape and floating-point dtype.
        delta: (m, n) or factors of it, m · n being the base's number of elements.

    Returns:
        The sum: float32, a new tensor of the base's shape.
    """
    if isinstance(delta, LowRank):
        matrix = base.float().reshape(delta.shape)
        return torch.addmm(matrix, delta.left, delta.right).view(base.shape)
    return base.float() + delta.reshape(base.shape)


def in_joint_space(
    fn: Callable[[list[Tensor], Tensor], Tensor], deltas: Sequence[LowRank]
) -> LowRank:
    """Run a method that is equivariant under rotations of rows and of columns on the cores.

    Args:
        fn: (cores, zeros) -> merged core; (p, q) each, p and q at most the ranks' sum.
        deltas: the task vectors.

    Returns:
        The merged task vector.
    """
    left, cores, right = joint_space(deltas)
    merged = fn(cores, torch.zeros_like(cores[0]))
    return LowRank(left @ merged, right)


def joint_space(deltas: Sequence[LowRank]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Write task vectors as U M_t Vᵀ with U and V in common.

    Args:
        deltas: the task vectors.

    Returns:
        U (m, p), the cores M_t (p, q) and Vᵀ (q, n), float32; p and q are at most the ranks' sum.
    """
    left = _basis(torch.cat([d.left for d in deltas], dim=1))
    right = _basis(torch.cat([d.right for d in deltas], dim=0).T)
    cores = [((left.T @ d.left.double()) @ (d.right.double() @ right)).float() for d in deltas]
    return left.float(), cores, right.float().T


def in_column_space(
    fn: Callable[[list[Tensor], Tensor], Tensor], deltas: Sequence[LowRank]
) -> LowRank:
    """Run a method that is equivariant under rotations of columns of length m only.

    Args:
        fn: (models, zeros) -> merged; (p, n) each, p at most the ranks' sum.
        deltas: the task vectors.

    Returns:
        The merged task vector.
    """
    left = _basis(torch.cat([d.left for d in deltas], dim=1))
    inner = [(left.T @ d.left.double()).float() @ d.right for d in deltas]
    return LowRank(left.float(), fn(inner, torch.zeros_like(inner[0])))


def _basis(columns: Tensor) -> Tensor:
    """Orthonormal columns, in float64, whose span holds those given."""
    basis: Tensor = torch.linalg.qr(columns.double()).Q
    return basis


def truncate(
    delta: Tensor | LowRank, *, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> tuple[LowRank, float]:
    """Approximate a task vector by one of low rank (Eckart and Young, 1936).

    Large matrices go through a randomised range finder with power iterations (Halko et al., 2011,
    Algorithm 4.4), so that no dense decomposition is needed.

    Args:
        delta: (m, n), or factors.
        rank: the largest rank; or
        energy: the share of ‖delta‖² that has to stay, in (0, 1].
        seed: of the range finder.

    Returns:
        The approximation, its factors balanced, of the lowest rank that does; and the share of
        ‖delta‖² that it holds.
    """
    if isinstance(delta, LowRank):
        left, (core,), right = joint_space([delta])
        inner_u, s, inner_vt = svd(core.double())
        u, vt = left.double() @ inner_u, inner_vt @ right.double()
        total = float(s.square().sum())
    else:
        total = float(delta.double().square().sum())
        u, s, vt = _leading(delta, total, rank, energy, seed)
    if total == 0:
        return LowRank(u[:, :0].float(), vt[:0].float()), 1.0
    held = s.square().cumsum(0) / total
    kept = min(rank if rank is not None else len(s), len(s))
    if energy is not None:
        kept = min(kept, int((held < energy * (1 - 1e-12)).sum()) + 1)
    kept = min(kept, int((s > s[0] * 1e-7).sum()))  # directions of nothing but rounding
    root = s[:kept].sqrt()
    factors = LowRank((u[:, :kept] * root).float(), (root[:, None] * vt[:kept]).float())
    return factors, min(1.0, float(held[kept - 1]))


def _leading(
    delta: Tensor, total: float, rank: int | None, energy: float | None, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As many leading singular triplets as are asked for, and some more."""
    smaller = min(delta.shape)
    width = 32 if rank is None else rank + 16
    generator = torch.Generator().manual_seed(seed)
    while 4 * width < smaller and smaller > 256:
        basis = range_basis(delta, width, generator, powers=4)
        u, s, vt = svd((basis.T @ delta).double())
        if rank is not None or float(s.square().sum()) >= (energy or 1.0) * total:
            return basis.double() @ u, s, vt
        width *= 2
    return svd(delta.double())
