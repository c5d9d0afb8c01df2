"""Passthrough: one model's tensors as they are, or scaled."""

from collections.abc import Sequence
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method


@merge_method(
    "passthrough",
    paper="https://arxiv.org/abs/2312.15166",
    family="interpolation",
    slices="entries",
    models=(1, 1),
)
def passthrough(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Take one model's tensors over, for use with `overrides`.

    θ = λ θ_1

    Args:
        models: the one tensor θ_1.
        base: not used.
        scale: the factor λ.

    Returns:
        The tensor: float32, the shape of the input.

    Reference:
        Kim et al. "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth
        Up-Scaling." 2023, §2, which copies layers; the name is the common toolkits'.

    Differences from the authors' code:
        Layers keep their places here: no depth is added.
    """
    return models[0].float() * scale
