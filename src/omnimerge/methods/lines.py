"""LiNeS: scale the merged task vector with depth."""

from collections.abc import Sequence
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import equal_weights, scaled_by_depth, weighted_sum
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method


@merge_method(
    "lines",
    paper="https://arxiv.org/abs/2410.17146",
    family="task vectors",
    needs_base=True,
    slices="entries",
    fused=True,
)
def lines(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    alpha: Annotated[float | None, Range(-10.0, 10.0)] = None,
    beta: Annotated[float, Range(-10.0, 10.0)] = 0.5,
    depth: float | None = None,
) -> Float[Tensor, "*shape"]:
    """Add the task vectors, those of deep layers with a larger factor.

    θ = θ_base + (α + β · d) Σ_t w_t τ_t,  d = l / (L - 1) for a tensor of layer l of L, and 0 for
    tensors outside of the layers. Shallow layers hold what all tasks share, deep ones what they
    differ in. The same factor can be put on any other method that works on task vectors, by the
    recipe key `lines: {alpha: 0.2, beta: 0.5}`.

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each.
        alpha: factor of the first layer; default: 1 / T, which the authors' rule (the ratio of the
            L1 norms of the summed and of the merged task vectors, over T) gives here.
        beta: how much larger the last layer's factor is; the authors search 0.1, 0.2 … 1.
        depth: d, provided by the caller; where there is none, as for one tensor alone, 0.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Wang et al. "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model
        Merging." ICLR 2025. Equation 3 and §5.

    Differences from the authors' code:
        Layers are those of the language model, where theirs are a vision transformer's; embedding,
        final norm and head get α, as everything outside of the blocks does there.
    """
    if base is None:
        raise MethodError("lines works on task vectors and needs a base")
    shares = equal_weights(weights, len(models))
    # θ_base + Σ w (θ_t - θ_base)
    merged = weighted_sum([base, *models], [1 - sum(shares), *shares])
    first = 1 / len(models) if alpha is None else alpha
    return scaled_by_depth(merged, base, (first, beta), depth)
