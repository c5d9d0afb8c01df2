"""Average: the uniform model soup."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from omnimerge.methods._ops import weighted_sum
from omnimerge.methods._registry import merge_method


@merge_method(
    "average",
    paper="https://arxiv.org/abs/2203.05482",
    family="interpolation",
    slices="entries",
    fused=True,
)
def average(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Average the models, all with the same weight.

    θ = (1 / T) Σ_t θ_t

    Args:
        models: one tensor θ_t per model, all of one shape.
        base: not used.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Reference:
        Wortsman et al. "Model soups: averaging weights of multiple fine-tuned models improves
        accuracy without increasing inference time." ICML 2022. §2, uniform soup; "Weight Average"
        in OptMerge (ICLR 2026), Tables 2, 3, 5 and 6.

    Differences from the authors' code:
        None known.
    """
    return weighted_sum(models, [1.0 / len(models)] * len(models))
