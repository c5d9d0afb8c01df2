"""Spherical interpolation of two tensors, seen as long vectors."""

import math
from collections.abc import Sequence
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import equal_weights
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method

_PAPER = "https://dl.acm.org/doi/10.1145/325165.325242"
# Cosines above which the straight line is taken: the limit of the common toolkits' slerp, and an
# angle of 1e-6, where float64 can no longer tell tensors from parallel or opposite ones.
_ALIKE = 0.9995
_COLINEAR = 1 - 0.5e-12


@merge_method("slerp", paper=_PAPER, family="sphere", needs_base=True, models=(1, 1))
def slerp(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    t: Annotated[float, Range(0.0, 1.0)],
) -> Float[Tensor, "*shape"]:
    """Go along the arc from the base to the model.

    θ = (sin((1-t) Ω) θ_base + sin(t Ω) θ_1) / sin Ω, Ω the angle between the two.

    Args:
        models: the one tensor θ_1 to go to.
        base: the tensor θ_base to start from; any model will do, it need not be an ancestor.
        t: how far to go: 0 is the base, 1 the model.

    Returns:
        The merged tensor: float32, the shape of the inputs. Where the two have a cosine above
        0.9995 or below -0.9995, or one is zero, the straight line is taken.

    Raises:
        MethodError: if there is no base.

    Reference:
        Shoemake. "Animating rotation with quaternion curves." SIGGRAPH 1985. §3.3.

    Differences from the authors' code:
        None published for models. The tensor is flattened, as the common toolkits do; the arc is
        computed in float64. Where one tensor is all zeros, the other counts with its share of
        the straight line; in mergekit as if it were at a right angle, with a sine.
    """
    if base is None:
        raise MethodError("slerp goes from a base to a model and needs a base")
    return _arc(base, models[0], t, _ALIKE)


@merge_method("nuslerp", paper=_PAPER, family="sphere", models=(2, 2))
def nuslerp(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(0.0, 10.0)] = None,
) -> Float[Tensor, "*shape"]:
    """Go along the arc between two models, as far as their weights say.

    t = w_2 / (w_1 + w_2);  θ = slerp(t; θ_1, θ_2)

    Args:
        models: two tensors of one shape.
        base: not used.
        weights: one weight per model; default: 1 each, the middle of the arc.

    Returns:
        The merged tensor: float32, the shape of the inputs. Where the two are colinear, to an
        angle of 1e-6, or one is zero, the straight line is taken.

    Raises:
        MethodError: if both weights are zero.

    Reference:
        Shoemake. "Animating rotation with quaternion curves." SIGGRAPH 1985. §3.3; the weighted
        form is the common toolkits'.

    Differences from the authors' code:
        None published for models. An all-zero tensor as for `slerp`. The toolkits also offer a
        form on task vectors and one per row; not here.
    """
    first, second = equal_weights(weights, 2)
    if first + second == 0:
        raise MethodError("nuslerp: the weights sum to zero")
    return _arc(models[0], models[1], second / (first + second), _COLINEAR)


def _arc(start: Tensor, end: Tensor, t: float, straight: float) -> Tensor:
    a, b = start.double(), end.double()
    norms = float(a.norm()) * float(b.norm())
    cosine = float((a * b).sum()) / norms if norms else 1.0
    if abs(cosine) > straight:
        return ((1 - t) * a + t * b).float()
    angle = math.acos(cosine)
    return ((math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)).float()
