"""Model Breadcrumbs: leave out the largest and the smallest changes."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import equal_weights, task_vectors
from omnimerge.methods._registry import Range, merge_method

_PAPER = "https://arxiv.org/abs/2312.06795"


@merge_method("breadcrumbs", paper=_PAPER, family="task vectors", needs_base=True)
def breadcrumbs(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.9,
    gamma: Annotated[float, Range(0.0, 1.0)] = 0.01,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    normalize: bool = False,
) -> Float[Tensor, "*shape"]:
    """Add the task vectors without their outliers and without their small entries.

    Per model, the share γ of entries of largest magnitude and so many of the smallest are set to
    zero that the share `density` is left;  θ = θ_base + λ Σ_t w_t τ̂_t

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each.
        density: share of entries kept per model.
        gamma: share of the largest entries that are left out; the paper's γ (it writes 1 - γ).
        scale: the factor λ; the paper's α.
        normalize: divide the weights by their sum.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Davari and Belilovsky. "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse
        Masks." ECCV 2024. §3.

    Differences from the authors' code:
        None known. Masks are per tensor ("layer-wise" in the paper); density is the common
        toolkits' keyword, the paper gives the share of small entries that is left out.
    """
    if base is None:
        raise MethodError("breadcrumbs works on task vectors and needs a base")
    weighted = _weighted(models, base, weights, density, gamma, normalize)
    return base.float() + scale * weighted.sum(dim=0)


@merge_method("breadcrumbs_ties", paper=_PAPER, family="task vectors", needs_base=True)
def breadcrumbs_ties(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.9,
    gamma: Annotated[float, Range(0.0, 1.0)] = 0.01,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    normalize: bool = False,
) -> Float[Tensor, "*shape"]:
    """Add what breadcrumbs leaves of the task vectors where it has the elected sign.

    τ̂_t as in `breadcrumbs`; γ = sign(Σ_t w_t τ̂_t);  θ = θ_base + λ Σ_t {w_t τ̂_t : its sign is γ}

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each.
        density: share of entries kept per model.
        gamma: share of the largest entries that are left out.
        scale: the factor λ.
        normalize: divide by the summed weights of the models that agree, entry by entry.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Davari and Belilovsky, ECCV 2024 (see `breadcrumbs`), with the sign election of Yadav et
        al. "TIES-Merging." NeurIPS 2023. Algorithm 1. The combination is the common toolkits'.

    Differences from the authors' code:
        None known.
    """
    if base is None:
        raise MethodError("breadcrumbs_ties works on task vectors and needs a base")
    weighted = _weighted(models, base, weights, density, gamma, normalize=False)
    agrees = weighted.sign() == weighted.sum(dim=0).sign()
    merged = (weighted * agrees).sum(dim=0)
    if normalize:
        shares = _column(equal_weights(weights, len(models)), base)
        total = (shares * (agrees & (weighted != 0))).sum(dim=0)
        merged = merged / torch.where(total == 0, torch.ones_like(total), total)
    return base.float() + scale * merged


def _weighted(
    models: Sequence[Tensor],
    base: Tensor,
    weights: Sequence[float] | None,
    density: float,
    gamma: float,
    normalize: bool,
) -> Tensor:
    shares = _column(equal_weights(weights, len(models)), base)
    if normalize:
        total = float(shares.sum())
        if total == 0:
            raise MethodError("breadcrumbs: the weights sum to zero; set normalize: false")
        shares = shares / total
    return shares * torch.stack(
        [_crumbs(tau, density, gamma) for tau in task_vectors(models, base)]
    )


def _crumbs(tau: Tensor, density: float, gamma: float) -> Tensor:
    """Zero the ⌊γ n⌋ largest entries, and the smallest until ⌊density · n⌋ are left."""
    flat = tau.flatten()
    count = flat.numel()
    top = int(gamma * count)
    bottom = max(0, count - int(density * count) - top)
    mask = torch.zeros_like(flat)
    mask[flat.abs().argsort(stable=True)[bottom : count - top]] = 1
    return (flat * mask).reshape(tau.shape)


def _column(weights: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(list(weights), dtype=torch.float32).reshape(-1, *[1] * like.ndim)
