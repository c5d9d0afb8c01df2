"""DARE: drop entries of the task vectors at random, and rescale the rest."""

from collections.abc import Sequence
from typing import Annotated, Literal

from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._kernels import Draw, Election, kernels
from omnimerge.methods._ops import equal_weights
from omnimerge.methods._params import Range
from omnimerge.methods._random import Stream
from omnimerge.methods._registry import merge_method

_PAPER = "https://arxiv.org/abs/2311.03099"


@merge_method(
    "dare_linear",
    paper=_PAPER,
    family="task vectors",
    needs_base=True,
    slices="entries",
    fused=True,
)
def dare_linear(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.5,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    stream: Stream | None = None,
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
        stream: to draw from, of (seed, tensor name, position); provided by the caller.

    Returns:
        The merged tensor: float32. Its expectation is that of `task_arithmetic`.

    Raises:
        MethodError: if there is no base.

    Reference:
        Yu et al. "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a
        Free Lunch." ICML 2024. Equations 1 to 3, with task arithmetic (§3.3).

    Differences from the authors' code:
        None known, but for the stream of random numbers. mergekit does not divide by the density,
        but rescales what is kept to the L1 norm of τ_t: the same up to the noise of the draw.
    """
    if base is None:
        raise MethodError("dare_linear works on task vectors and needs a base")
    left, shares = Draw(stream or Stream.of(0, ""), density), equal_weights(weights, len(models))
    return kernels(base).merge(models, base, shares, left, scale=scale)


@merge_method(
    "drop_linear",
    paper=_PAPER,
    family="task vectors",
    needs_base=True,
    slices="entries",
    fused=True,
)
def drop_linear(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    density: Annotated[float, Range(0.0, 1.0)] = 0.5,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    stream: Stream | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop at random, rescale, and average the task vectors, as AdaMMS's code does.

    τ̂_t as in `dare_linear`;  θ = θ_base + λ · mean_t τ̂_t

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        density: probability that an entry is kept.
        scale: the factor λ on the merged task vector.
        stream: to draw from, of (seed, tensor name, position); provided by the caller.

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
    left, shares = Draw(stream or Stream.of(0, ""), density), [1 / len(models)] * len(models)
    return kernels(base).merge(models, base, shares, left, scale=scale)


@merge_method(
    "dare_ties", paper=_PAPER, family="task vectors", needs_base=True, slices="entries", fused=True
)
def dare_ties(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.5,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    merge: Literal["mean", "sum"] = "mean",
    stream: Stream | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop at random, rescale, elect a sign, and merge what agrees.

    τ̂_t as in `dare_linear`;  γ = sign(Σ_t w_t τ̂_t);  τ = mean (or sum) of
    {w_t τ̂_t : sign τ̂_t = γ};  θ = θ_base + λ τ

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each.
        density: probability that an entry is kept.
        scale: the factor λ on the merged task vector.
        merge: `mean` divides by the weights of the models that agree, entry by entry; `sum` does
            not.
        stream: to draw from, of (seed, tensor name, position); provided by the caller.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Yu et al., ICML 2024 (see `dare_linear`), with the election and the disjoint mean of Yadav
        et al. "TIES-Merging." NeurIPS 2023. Algorithm 1; nothing is trimmed.

    Differences from the authors' code:
        As for `dare_linear`. Entries of which the sum cancels exactly stay the base's, where
        mergekit keeps the positive ones.
    """
    if base is None:
        raise MethodError("dare_ties works on task vectors and needs a base")
    left, shares = Draw(stream or Stream.of(0, ""), density), equal_weights(weights, len(models))
    return kernels(base).merge(models, base, shares, left, Election(merge == "mean"), scale)
