"""SCE: select the entries that vary, calculate weights from them, erase minority signs."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import task_vectors
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method


@merge_method(
    "sce", paper="https://arxiv.org/abs/2408.07990", family="task vectors", needs_base=True
)
def sce(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    select_top: Annotated[float, Range(0.0, 1.0)] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Merge the entries in which the task vectors differ most, weighted by their energy.

    Select: the share `select_top` of entries with the largest variance over the models.
    Calculate: w_t = mean τ_t² over them, summing to one. Erase: entries of τ_t whose sign is not
    that of Σ_t τ_t.  θ = θ_base + Σ_t w_t τ_t / Σ_t w_t, both sums over what is left.

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        select_top: share of entries that are selected; 1 selects all.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Wan et al. "FuseChat: Knowledge Fusion of Chat Models." 2024. §3.3 (SCE), Equations 5 to 7.

    Differences from the authors' code:
        The weights are always those of the formula; mergekit takes equal ones where the mean
        squares sum to less than 1e-6, which those of most fine-tunes do, and divides by at least
        1e-6 where few weights are left. With `select_top` below 1 it selects that share of the
        entries that vary at all. Where task vectors cancel exactly, it keeps the positive ones.
    """
    if base is None:
        raise MethodError("sce works on task vectors and needs a base")
    tau = task_vectors(models, base)
    count = int(select_top * base.numel())
    if count == 0:
        return base.float().clone()
    variance = tau.var(dim=0, unbiased=False).flatten()
    chosen = torch.zeros_like(variance)
    chosen[variance.argsort(descending=True, stable=True)[:count]] = 1
    tau = tau * chosen.reshape(base.shape)
    energy = tau.square().flatten(start_dim=1).mean(dim=1) if tau.ndim > 1 else tau.square()
    weights = energy / energy.sum().clamp(min=1e-38)
    weights = weights.reshape(-1, *[1] * base.ndim)
    agrees = tau.sign() == tau.sum(dim=0).sign()
    total = (weights * agrees).sum(dim=0)
    merged = (weights * tau * agrees).sum(dim=0) / torch.where(
        total > 0, total, torch.ones_like(total)
    )
    return base.float() + merged
