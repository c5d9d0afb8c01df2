"""Isotropic merging: give all singular directions of the merged task vector the same strength."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import is_matrix, orthogonalize, svd, task_vectors
from omnimerge.methods._registry import Range, merge_method

_PAPER = "https://arxiv.org/abs/2502.04959"


@merge_method("iso_c", paper=_PAPER, family="spectral", needs_base=True, select="linear")
def iso_c(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Flatten the spectrum of the summed task vectors.

    Σ_t τ_t = U S Vᵀ;  σ = mean of the min(m, n) singular values;  θ = θ_base + λ · σ U Vᵀ

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        scale: the factor λ on the merged task vector.

    Returns:
        The merged tensor: float32. Tensors that are no matrices get θ_base + λ · mean_t τ_t.

    Raises:
        MethodError: if there is no base.

    Reference:
        Marczak et al. "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
        Subspaces." ICML 2025. Algorithm 1 (Iso-C).

    Differences from the authors' code:
        None known for matrices. Where the sum has not full rank (LoRA), U Vᵀ has directions that
        the data do not determine; OptMerge finds Iso-C to fail there (its Table 3).
    """
    if base is None:
        raise MethodError("iso_c works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    u, s, vt = svd(tau.sum(dim=0))
    return base.float() + scale * s.mean() * (u @ vt)


@merge_method("iso_cts", paper=_PAPER, family="spectral", needs_base=True, select="linear")
def iso_cts(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    common_share: Annotated[float, Range(0.0, 1.0)] = 0.8,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Flatten a spectrum made of common directions and of each task's own.

    The last directions of Σ_t τ_t = U S Vᵀ are replaced: each task gives the same number of main
    singular directions of (I - U_c U_cᵀ) τ_t, U_c being the common ones that stay; all are made
    orthonormal;  θ = θ_base + λ · σ Û V̂ᵀ with σ the mean of all singular values taken.

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        common_share: share of the min(m, n) directions that are common; the paper uses 0.8.
        scale: the factor λ on the merged task vector.

    Returns:
        The merged tensor: float32. Tensors that are no matrices get θ_base + λ · mean_t τ_t.

    Raises:
        MethodError: if there is no base.

    Reference:
        Marczak et al. "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
        Subspaces." ICML 2025. Algorithm 2 (Iso-CTS).

    Differences from the authors' code:
        None known for matrices; the number of own directions is rounded to a multiple of the
        number of tasks, as there.
    """
    if base is None:
        raise MethodError("iso_cts works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    rank, tasks = min(base.shape), len(models)
    own = min(round((rank - int(rank * common_share)) / tasks), rank // tasks)
    common = rank - own * tasks
    u, s, vt = svd(tau.sum(dim=0))
    shared = u[:, :common]
    rest_u, rest_s, rest_vt = svd(tau - shared @ (shared.T @ tau))
    left = orthogonalize(torch.cat([*rest_u[:, :, :own], shared], dim=1))
    right = orthogonalize(torch.cat([*(v[:own].T for v in rest_vt), vt[:common].T], dim=1))
    strength = torch.cat([rest_s[:, :own].flatten(), s[:common]]).mean()
    return base.float() + scale * strength * (left @ right.T)
