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
