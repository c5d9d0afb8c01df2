"""Steps that several papers share. Everything here is a pure function of tensors.

Shape letters used in this package: ``*shape`` = the shape of the one weight tensor being merged.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def weighted_sum(
    tensors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float]
) -> Float[Tensor, "*shape"]:
    """Return Σ_t w_t x_t in float32, one tensor at a time so that nothing is stacked.

    Args:
        tensors: x_t, in any floating-point dtype.
        weights: w_t, one per tensor.

    Returns:
        The sum: float32, a new tensor.
    """
    total = torch.mul(tensors[0].float(), weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.float(), alpha=weight)
    return total


def equal_weights(weights: Sequence[float] | None, count: int) -> Sequence[float]:
    """Return `weights`, or one for every model where none were given.

    Args:
        weights: what the caller gave.
        count: number of models.

    Returns:
        One weight per model.
    """
    return [1.0] * count if weights is None else weights
