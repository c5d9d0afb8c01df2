"""Means of several tensors on the sphere of their directions."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.methods._ops import equal_weights
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method

_PAPER = "https://doi.org/10.1002/cpa.3160300502"


@merge_method("karcher", paper=_PAPER, family="sphere")
def karcher(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    iterations: Annotated[int, Range(1, 1000)] = 10,
    tolerance: Annotated[float, Range(0.0, 1.0)] = 1e-5,
) -> Float[Tensor, "*shape"]:
    """Find the direction whose squared angles to all models sum to the least.

    u_t = θ_t / ‖θ_t‖; from the mean direction u, repeat u ← exp_u(mean_t log_u(u_t)) until the
    step is shorter than the tolerance;  θ = mean_t ‖θ_t‖ · u

    Args:
        models: one tensor θ_t per model, all of one shape.
        base: not used.
        iterations: the most steps.
        tolerance: angle in radians below which a step ends the search.

    Returns:
        The merged tensor: float32. Zero tensors have no direction and count by their norm only.

    Reference:
        Karcher. "Riemannian center of mass and mollifier smoothing." Communications on Pure and
        Applied Mathematics 30, 1977.

    Differences from the authors' code:
        None published for models.
    """
    directions, norms = _directions(models)
    mean = _unit(directions.mean(dim=0))
    for _ in range(iterations):
        cosine = (directions @ mean).clamp(-1, 1)
        angle = cosine.acos()
        # angle / sin(angle), which is 1 at 0
        stretch = 1 / torch.sinc(angle / torch.pi).clamp(min=1e-12)
        tangent = (stretch[:, None] * (directions - cosine[:, None] * mean)).mean(dim=0)
        length = tangent.norm()
        if float(length) <= tolerance:
            break
        mean = _unit(length.cos() * mean + length.sin() / length * tangent)
    merged: Tensor = mean * norms.mean()
    return merged.reshape(models[0].shape).float()


@merge_method("multislerp", paper=_PAPER, family="sphere")
def multislerp(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(0.0, 10.0)] = None,
) -> Float[Tensor, "*shape"]:
    """Take one step of the weighted mean on the sphere, from the mean direction.

    u = unit(Σ_t w_t u_t);  τ = Σ_t w_t (u_t - ⟨u_t, u⟩ u);
    θ = Σ_t w_t ‖θ_t‖ · (cos ‖τ‖ u + sin ‖τ‖ τ / ‖τ‖), the w_t summing to one.

    Args:
        models: one tensor θ_t per model, all of one shape.
        base: not used.
        weights: one weight per model; default: 1 each.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Reference:
        The common toolkits' method of this name; the mean on the sphere is Karcher's (1977).

    Differences from the authors' code:
        None known. Like the toolkit's, it projects onto the tangent space where the exact mean
        would take logarithms; `karcher` does the latter, with equal weights.
    """
    directions, norms = _directions(models)
    given = torch.tensor(equal_weights(weights, len(models)), dtype=torch.float64).to(norms.device)
    shares = given / given.sum().clamp(min=1e-300)
    mean = _unit((shares[:, None] * directions).sum(dim=0))
    cosine = directions @ mean
    tangent = (shares[:, None] * (directions - cosine[:, None] * mean)).sum(dim=0)
    length = tangent.norm()
    turned = length.cos() * mean + torch.sinc(length / torch.pi) * tangent
    merged: Tensor = turned * (shares * norms).sum()
    return merged.reshape(models[0].shape).float()


def _directions(models: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    flat = torch.stack([model.double().flatten() for model in models])
    norms: Tensor = flat.norm(dim=1)
    return flat / norms.clamp(min=1e-300)[:, None], norms


def _unit(vector: Tensor) -> Tensor:
    length: Tensor = vector.norm()
    return vector / length.clamp(min=1e-300)
