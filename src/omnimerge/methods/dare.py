"""DARE: drop entries of the task vectors at random, and rescale the rest."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import disjoint_mean, equal_weights, task_vectors
from omnimerge.methods._registry import Range, generator_for, merge_method

_PAPER = "https://arxiv.org/abs/2311.03099"


@merge_method("dare_linear", paper=_PAPER, family="task vectors", needs_base=True, random=True)
def dare_linear(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.5,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop at random, rescale, and add the task vectors.

    m_t ~ Bernoulli(density), entry by entry;  τ̂_t = m_t τ_t / density;
    θ = θ_base + λ Σ_t w_t τ̂_t

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each.
        density: probability that an entry is kept; the paper's p is 1 - density.
        scale: the factor λ on the merged task vector.
        generator: to draw from, seeded by (seed, tensor name); provided by the caller.

    Returns:
        The merged tensor: float32. Its expectation is that of `task_arithmetic`.

    Raises:
        MethodError: if there is no base.

    Reference:
        Yu et al. "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a
        Free Lunch." ICML 2024. Equations 1 to 3, with task arithmetic (§3.3).

    Differences from the authors' code:
        None known, but for the stream of random numbers.
    """
    if base is None:
        raise MethodError("dare_linear works on task vectors and needs a base")
    dropped = drop_and_rescale(task_vectors(models, base), density, density, generator)
    merged = base.float().clone()
    for tau, weight in zip(dropped, equal_weights(weights, len(models)), strict=True):
        merged.add_(tau, alpha=scale * weight)
    return merged


@merge_method("drop_linear", paper=_PAPER, family="task vectors", needs_base=True, random=True)
def drop_linear(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    density: Annotated[float, Range(0.0, 1.0)] = 0.5,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop at random, rescale, and average the task vectors, as AdaMMS's code does.

    τ̂_t as in `dare_linear`;  θ = θ_base + λ · mean_t τ̂_t

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        density: probability that an entry is kept.
        scale: the factor λ on the merged task vector.
        generator: to draw from, seeded by (seed, tensor name); provided by the caller.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        The baseline "DARE-Linear" of Du et al. "AdaMMS." CVPR 2025, in its code; the dropping is
        that of Yu et al. (ICML 2024).

    Differences from the authors' code:
        None known, but for the stream of random numbers.
    """
    if base is None:
        raise MethodError("drop_linear works on task vectors and needs a base")
    dropped = drop_and_rescale(task_vectors(models, base), density, density, generator)
    return base.float() + scale * dropped.mean(dim=0)


@merge_method("dare_ties", paper=_PAPER, family="task vectors", needs_base=True, random=True)
def dare_ties(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.5,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop at random, rescale, elect a sign, and average what agrees.

    τ̂_t as in `dare_linear`;  γ = sign(Σ_t w_t τ̂_t);  θ = θ_base + λ · weighted mean of the τ̂_t
    whose sign is γ

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each.
        density: probability that an entry is kept.
        scale: the factor λ on the merged task vector.
        generator: to draw from, seeded by (seed, tensor name); provided by the caller.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Yu et al., ICML 2024 (see `dare_linear`), with the election and the disjoint mean of Yadav
        et al. "TIES-Merging." NeurIPS 2023. Algorithm 1; nothing is trimmed.

    Differences from the authors' code:
        None known, but for the stream of random numbers.
    """
    if base is None:
        raise MethodError("dare_ties works on task vectors and needs a base")
    tau = drop_and_rescale(task_vectors(models, base), density, density, generator)
    return base.float() + scale * disjoint_mean(tau, weights)


def drop_and_rescale(
    tau: Tensor, keep: Tensor | float, rescale: float, generator: torch.Generator | None
) -> Tensor:
    """Keep each entry with probability `keep`, and divide what is kept by `rescale`.

    Args:
        tau: task vectors.
        keep: probability in [0, 1], one for all or one per entry.
        rescale: divisor; 0 leaves nothing.
        generator: to draw from; default: the one of seed 0 without a name.

    Returns:
        The sparse task vectors.
    """
    drawn = torch.rand(tau.shape, generator=generator or generator_for(0, ""))
    return tau * (drawn < keep) / (rescale or 1.0)
