"""Isotropic merging: give all singular directions of the merged task vector the same strength."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import (
    is_matrix,
    matrix_shape,
    orthogonalize,
    significant,
    svd,
    task_vectors,
)
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method

_PAPER = "https://arxiv.org/abs/2502.04959"


@merge_method(
    "iso_c", paper=_PAPER, family="spectral", needs_base=True, select="linear", low_rank="joint"
)
def iso_c(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    full_shape: tuple[int, int] | None = None,
) -> Float[Tensor, "*shape"]:
    """Flatten the spectrum of the summed task vectors.

    Σ_t τ_t = U S Vᵀ;  σ = mean of the min(m, n) singular values;  θ = θ_base + λ · σ U Vᵀ

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        scale: the factor λ on the merged task vector.
        full_shape: (m, n) where the models are cores of larger matrices; provided by the caller.

    Returns:
        The merged tensor: float32. Tensors that are no matrices get θ_base + λ · mean_t τ_t.

    Raises:
        MethodError: if there is no base.

    Reference:
        Marczak et al. "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
        Subspaces." ICML 2025. Algorithm 1 (Iso-C).

    Differences from the authors' code:
        Where the sum has not full rank (LoRA), U Vᵀ has directions that the data do not determine;
        they are left out here, and are arbitrary there. OptMerge finds Iso-C to fail on LoRA
        experts (its Table 3).
    """
    if base is None:
        raise MethodError("iso_c works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    u, s, vt = svd(tau.sum(dim=0))
    shape = full_shape or matrix_shape(base)
    used = significant(s, shape)
    return base.float() + scale * (s.sum() / min(shape)) * (u[:, used] @ vt[used])


@merge_method(
    "iso_cts", paper=_PAPER, family="spectral", needs_base=True, select="linear", low_rank="joint"
)
def iso_cts(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    common_share: Annotated[float, Range(0.0, 1.0)] = 0.8,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    full_shape: tuple[int, int] | None = None,
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
        full_shape: (m, n) where the models are cores of larger matrices; provided by the caller.

    Returns:
        The merged tensor: float32. Tensors that are no matrices get θ_base + λ · mean_t τ_t.

    Raises:
        MethodError: if there is no base.

    Reference:
        Marczak et al. "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
        Subspaces." ICML 2025. Algorithm 2 (Iso-CTS).

    Differences from the authors' code:
        Directions that are zero up to rounding are left out, as in `iso_c`. The number of own
        directions is rounded to a multiple of the number of tasks, as there.
    """
    if base is None:
        raise MethodError("iso_cts works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    shape, tasks = full_shape or matrix_shape(base), len(models)
    rank = min(shape)
    own = min(round((rank - int(rank * common_share)) / tasks), rank // tasks)
    common = rank - own * tasks
    u, s, vt = svd(tau.sum(dim=0))
    u, vt = u[:, :common], vt[:common]
    rest_u, rest_s, rest_vt = svd(tau - u @ (u.T @ tau))
    # What the common directions leave of a task is compared with the task's own size.
    floor = torch.finfo(s.dtype).eps * max(shape) * tau.flatten(1).norm(dim=1)[:, None]
    used, own_used = significant(s, shape)[:common], rest_s[:, :own] > floor
    each = list(zip(rest_u[:, :, :own], rest_vt[:, :own], own_used, strict=True))
    left = orthogonalize(torch.cat([*(a[:, k] for a, _, k in each), u[:, used]], dim=1))
    right = orthogonalize(torch.cat([*(b[k].T for _, b, k in each), vt[used].T], dim=1))
    strength = (rest_s[:, :own].sum() + s[:common].sum()) / rank
    return base.float() + scale * strength * (left @ right.T)
