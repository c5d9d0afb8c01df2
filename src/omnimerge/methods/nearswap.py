"""NearSwap: take over from a model what hardly differs from the base."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method


@merge_method(
    "nearswap",
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    family="interpolation",
    needs_base=True,
    slices="entries",
    models=(1, 1),
)
def nearswap(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    t: Annotated[float, Range(0.0, 1.0)],
) -> Float[Tensor, "*shape"]:
    """Interpolate towards the model, the more the nearer it is.

    s = min(t / |θ_1 - θ_base|, 1), entry by entry;  θ = (1 - s) θ_base + s θ_1

    Args:
        models: the one tensor θ_1.
        base: the tensor θ_base that most entries stay close to.
        t: difference up to which an entry is taken over in full; larger ones move by t at most.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        The model card of QuartetAnemoi-70B (alchemonaut, 2024), where the method was published.

    Differences from the authors' code:
        None known.
    """
    if base is None:
        raise MethodError("nearswap keeps close to a base and needs one")
    origin, model = base.float(), models[0].float()
    step = model - origin
    return origin + torch.clamp(step, -t, t)
