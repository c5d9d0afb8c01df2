"""Linear: weighted average of the weights (model soups)."""

from collections.abc import Sequence
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import equal_weights, weighted_sum
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method


@merge_method(
    "linear",
    paper="https://arxiv.org/abs/2203.05482",
    family="interpolation",
    slices="entries",
    fused=True,
)
def linear(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    normalize: bool = True,
) -> Float[Tensor, "*shape"]:
    """Average the models, each with its weight.

    θ = Σ_t w_t θ_t / Σ_t w_t, or without the division where `normalize` is false.

    Args:
        models: one tensor θ_t per model, all of one shape.
        base: not used.
        weights: one weight w_t per model; default: 1 each.
        normalize: divide by the sum of the weights.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if the weights sum to zero and `normalize` is true.

    Reference:
        Wortsman et al. "Model soups: averaging weights of multiple fine-tuned models improves
        accuracy without increasing inference time." ICML 2022. The weighted form is the common
        toolkits'; with equal weights it is the paper's uniform soup (§2).

    Differences from the authors' code:
        None known. Their greedy soup needs labelled data and is not here.
    """
    shares = equal_weights(weights, len(models))
    total = sum(shares) if normalize else 1.0
    if abs(total) <= 1e-6 * sum(abs(w) for w in shares):
        raise MethodError("linear: the weights sum to zero; set normalize: false or other weights")
    return weighted_sum(models, [w / total for w in shares])
