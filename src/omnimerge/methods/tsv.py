"""TSV-Merge: keep the main singular vectors of every task, made orthogonal to each other."""

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


@merge_method(
    "tsv",
    paper="https://arxiv.org/abs/2412.00081",
    family="spectral",
    needs_base=True,
    select="linear",
    low_rank="joint",
)
def tsv(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    full_shape: tuple[int, int] | None = None,
) -> Float[Tensor, "*shape"]:
    """Merge the main singular vectors of all tasks after decorrelating them.

    τ_t = U_t S_t V_tᵀ, of which the first k = ⌊min(m, n) / T⌋ singular triplets are kept; the U_t
    and the V_t of all tasks are put side by side and replaced by the nearest orthonormal
    matrices Û and V̂;  θ = θ_base + λ · Û diag(S_1 … S_T) V̂ᵀ

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
        Gargiulo et al. "Task Singular Vectors: Reducing Task Interference in Model Merging."
        CVPR 2025. Algorithm 1 (TSV-Merge).

    Differences from the authors' code:
        Directions whose singular value is zero up to rounding (LoRA) are left out: the code takes
        arbitrary ones, which alter the others when all are made orthogonal. OptMerge's published
        tables took their TSV from a script that applied it to no tensor and averaged instead; its
        corrected baseline file agrees with this.
    """
    if base is None:
        raise MethodError("tsv works on task vectors and needs a base")
    tau = task_vectors(models, base)
    if not is_matrix(base):
        return base.float() + scale * tau.mean(dim=0)
    shape = full_shape or matrix_shape(base)
    kept = min(shape) // len(models)
    if kept == 0:
        raise MethodError(f"tsv: {len(models)} models are more than the rank of a {shape} matrix")
    u, s, vt = svd(tau)
    used = significant(s, shape)[:, :kept]
    if not used.any():
        return base.float().clone()
    left = orthogonalize(torch.cat([a[:, :kept][:, k] for a, k in zip(u, used, strict=True)], 1))
    right = orthogonalize(torch.cat([b[:kept][k].T for b, k in zip(vt, used, strict=True)], 1))
    return base.float() + scale * (left * s[:, :kept][used]) @ right.T
