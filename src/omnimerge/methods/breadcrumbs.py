"""Model Breadcrumbs: leave out the largest and the smallest changes."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._kernels import Band, Election, kernels
from omnimerge.methods._ops import equal_weights
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method
from omnimerge.methods._statistics import Magnitudes, gather

_PAPER = "https://arxiv.org/abs/2312.06795"


class _Crumbs(Magnitudes):
    """The largest and the smallest magnitude that is kept of each task vector.

    Args:
        models: number of models.
        parameters: `density` and `gamma` of the method.
    """

    def __init__(self, models: int, parameters: Mapping[str, Any]) -> None:
        density, gamma = float(parameters["density"]), float(parameters["gamma"])

        def ranks(numel: int) -> tuple[int, int]:
            above, kept = int(gamma * numel), int(density * numel)
            last = min(numel, above + kept)
            return (above + 1, last) if last > above else (0, 0)

        super().__init__(models, ranks, "tensor")


@merge_method(
    "breadcrumbs",
    paper=_PAPER,
    family="task vectors",
    needs_base=True,
    slices="entries",
    fused=True,
    statistics=_Crumbs,
)
def breadcrumbs(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.9,
    gamma: Annotated[float, Range(0.0, 1.0)] = 0.01,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    normalize: bool = False,
    statistics: _Crumbs | None = None,
) -> Float[Tensor, "*shape"]:
    """Add the task vectors without their outliers and without their small entries.

    Per model, the share γ of entries of largest magnitude and so many of the smallest are set to
    zero that the share `density` is left;  θ = θ_base + λ Σ_t w_t τ̂_t

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each.
        density: share of entries kept per model.
        gamma: share of the largest entries that are left out; the paper's γ (it writes 1 - γ).
        scale: the factor λ; the paper's α.
        normalize: divide the weights by their sum.
        statistics: the thresholds; provided by the caller where a slice is merged.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Davari and Belilovsky. "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse
        Masks." ECCV 2024. §3.

    Differences from the authors' code:
        None known, but that entries as large as the last one kept are kept too. Masks are per
        tensor ("layer-wise" in the paper); density is the common toolkits' keyword, the paper gives
        the share of small entries that is left out.
    """
    if base is None:
        raise MethodError("breadcrumbs works on task vectors and needs a base")
    shares = equal_weights(weights, len(models))
    if normalize and sum(shares) == 0:
        raise MethodError("breadcrumbs: the weights sum to zero; set normalize: false")
    left = _kept(models, base, density, gamma, statistics)
    factor = scale / sum(shares) if normalize else scale
    return kernels(base).merge(models, base, shares, left, scale=factor)


@merge_method(
    "breadcrumbs_ties",
    paper=_PAPER,
    family="task vectors",
    needs_base=True,
    slices="entries",
    fused=True,
    statistics=_Crumbs,
)
def breadcrumbs_ties(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.9,
    gamma: Annotated[float, Range(0.0, 1.0)] = 0.01,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    normalize: bool = False,
    statistics: _Crumbs | None = None,
) -> Float[Tensor, "*shape"]:
    """Add what breadcrumbs leaves of the task vectors where it has the elected sign.

    τ̂_t as in `breadcrumbs`; γ = sign(Σ_t w_t τ̂_t);  θ = θ_base + λ Σ_t {w_t τ̂_t : its sign is γ}

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each.
        density: share of entries kept per model.
        gamma: share of the largest entries that are left out.
        scale: the factor λ.
        normalize: divide by the summed weights of the models that agree, entry by entry.
        statistics: the thresholds; provided by the caller where a slice is merged.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Davari and Belilovsky, ECCV 2024 (see `breadcrumbs`), with the sign election of Yadav et
        al. "TIES-Merging." NeurIPS 2023. Algorithm 1. The combination is the common toolkits'.

    Differences from the authors' code:
        None known.
    """
    if base is None:
        raise MethodError("breadcrumbs_ties works on task vectors and needs a base")
    shares = equal_weights(weights, len(models))
    left = _kept(models, base, density, gamma, statistics)
    return kernels(base).merge(models, base, shares, left, Election(mean=normalize), scale)


def _kept(
    models: Sequence[Tensor],
    base: Tensor,
    density: float,
    gamma: float,
    statistics: _Crumbs | None,
) -> Band:
    """All but the largest and smallest entries."""
    if statistics is None:
        statistics = _Crumbs(len(models), {"density": density, "gamma": gamma})
        gather(statistics, lambda: [(models, base)])
    high, low = statistics.thresholds
    return Band(low, high)
