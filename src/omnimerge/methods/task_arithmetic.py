"""Task arithmetic: add what each model learned to the base."""

from collections.abc import Sequence
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._kernels import kernels
from omnimerge.methods._ops import equal_weights
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method


@merge_method(
    "task_arithmetic",
    paper="https://arxiv.org/abs/2212.04089",
    family="task vectors",
    needs_base=True,
    slices="entries",
    fused=True,
)
def task_arithmetic(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Add the weighted sum of the task vectors to the base.

    τ_t = θ_t - θ_base;  θ = θ_base + λ · Σ_t w_t τ_t

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each, as in the paper.
        scale: the paper's λ; it finds 0.3 to 0.5 good for many tasks, on validation data.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Ilharco et al. "Editing Models with Task Arithmetic." ICLR 2023. §2 and §4.

    Differences from the authors' code:
        Weights per model are ours. AdaMMS's baseline takes the mean of two task vectors, which is
        `scale` 0.5 here.
    """
    if base is None:
        raise MethodError("task_arithmetic works on task vectors and needs a base")
    shares = equal_weights(weights, len(models))
    # Differences first, so that what a model did not change cancels exactly.
    return kernels(base).combine(models, base, [scale * weight for weight in shares])
