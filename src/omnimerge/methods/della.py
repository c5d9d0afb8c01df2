"""DELLA: drop entries at random, small ones with a higher probability."""

from collections.abc import Sequence
from typing import Annotated, Literal

from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._kernels import Draw, DrawByRank, Election, kernels
from omnimerge.methods._ops import equal_weights
from omnimerge.methods._params import Range
from omnimerge.methods._random import Stream
from omnimerge.methods._registry import merge_method

_PAPER = "https://arxiv.org/abs/2406.11617"


@merge_method(
    "della", paper=_PAPER, family="task vectors", needs_base=True, slices="rows", fused=True
)
def della(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.5,
    epsilon: Annotated[float, Range(0.0, 1.0)] = 0.1,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    merge: Literal["mean", "sum"] = "mean",
    stream: Stream | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop by rank, rescale, elect a sign, and merge what agrees.

    p_i = 1 - density + ε (1/2 - r_i), r_i in (0, 1) the rank of |τ_i| in its row, the largest next
    to 1; an entry is dropped with p_i, else divided by 1 - p_i;  γ = sign(Σ_t w_t τ̂_t);
    τ = mean (or sum) of {w_t τ̂_t : sign τ̂_t = γ};  θ = θ_base + λ τ

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each.
        density: mean probability that an entry is kept; the paper's p is 1 - density.
        epsilon: width of the range of probabilities, the paper's ε; they stay within [0, 1].
        scale: the factor λ on the merged task vector.
        merge: `mean` divides by the weights of the models that agree, entry by entry; `sum` does
            not.
        stream: to draw from, of (seed, tensor name, position); provided by the caller.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Deep et al. "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based
        Sampling." 2024. §3, Equations 1 to 5.

    Differences from the authors' code:
        Ranks are exact (in float32) and centred, so that the mean probability is `density` in
        every row; the stream of random numbers is ours. mergekit's epsilon is half of ours, and
        gives the same probabilities to ε / 2n, n the length of a row. But it rescales all that
        is kept by one factor, to the L1 norm of τ_t: on average small entries shrink and large
        ones grow (0.62 to 1.16 times for a normal τ_t, density 0.5 and ε 0.3); here each keeps
        its size. Sums that cancel exactly as for `dare_ties`.
    """
    if base is None:
        raise MethodError("della works on task vectors and needs a base")
    left, shares = _magprune(density, epsilon, stream), equal_weights(weights, len(models))
    return kernels(base).merge(models, base, shares, left, Election(merge == "mean"), scale)


@merge_method(
    "della_linear", paper=_PAPER, family="task vectors", needs_base=True, slices="rows", fused=True
)
def della_linear(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.5,
    epsilon: Annotated[float, Range(0.0, 1.0)] = 0.1,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    stream: Stream | None = None,
) -> Float[Tensor, "*shape"]:
    """Drop by rank, rescale, and add the task vectors.

    τ̂_t as in `della`;  θ = θ_base + λ Σ_t w_t τ̂_t

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each.
        density: mean probability that an entry is kept; the paper's p is 1 - density.
        epsilon: width of the range of probabilities, the paper's ε.
        scale: the factor λ on the merged task vector.
        stream: to draw from, of (seed, tensor name, position); provided by the caller.

    Returns:
        The merged tensor: float32. Its expectation is that of `task_arithmetic`.

    Raises:
        MethodError: if there is no base.

    Reference:
        Deep et al. "DELLA-Merging." 2024. §3, Equations 1 to 4, without the election.

    Differences from the authors' code:
        As for `della`.
    """
    if base is None:
        raise MethodError("della_linear works on task vectors and needs a base")
    left, shares = _magprune(density, epsilon, stream), equal_weights(weights, len(models))
    return kernels(base).merge(models, base, shares, left, scale=scale)


def _magprune(density: float, epsilon: float, stream: Stream | None) -> Draw | DrawByRank:
    """How entries are dropped; where none is kept on average, all are dropped."""
    drawn = stream or Stream.of(0, "")
    return DrawByRank(drawn, density, epsilon) if density else Draw(drawn, density)
