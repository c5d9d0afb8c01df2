"""TIES: trim, elect sign, disjoint merge."""

from collections.abc import Sequence
from typing import Annotated, Literal

from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._kernels import Band, Election, kernels
from omnimerge.methods._ops import equal_weights
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method
from omnimerge.methods._statistics import Trimming, gather


@merge_method(
    "ties",
    paper="https://arxiv.org/abs/2306.01708",
    family="task vectors",
    needs_base=True,
    slices="entries",
    fused=True,
    statistics=Trimming,
)
def ties(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.2,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    merge: Literal["mean", "sum"] = "mean",
    threshold_scope: Literal["exact", "tensor", "model"] = "exact",
    statistics: Trimming | None = None,
) -> Float[Tensor, "*shape"]:
    """Keep the largest changes, agree on a sign, merge what agrees.

    τ̂_t = τ_t where |τ_t| is among the largest, else 0;  γ = sign(Σ_t w_t τ̂_t);
    τ = mean (or sum) of {w_t τ̂_t : sign τ̂_t = γ};  θ = θ_base + λ τ

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each, as in the paper.
        density: share of entries kept per model; the paper's k = 20 % is 0.2.
        scale: the paper's λ.
        merge: `mean` divides by the weights of the models that agree, entry by entry, as in the
            paper; `sum` does not.
        threshold_scope: over what the largest are taken, n entries: `exact` keeps ⌊density · n⌋ of
            each tensor; `tensor` n - ⌊(1 - density) n⌋ + 1 of each tensor, as OptMerge's code for
            Qwen2-VL does; `model` ⌊density · n⌋ + 1 of the whole model, as AdaMMS's code and the
            authors' do. Entries as large as the last one kept are kept too.
        statistics: the thresholds; provided by the caller where a slice is merged.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Yadav et al. "TIES-Merging: Resolving Interference When Merging Models." NeurIPS 2023.
        Algorithm 1.

    Differences from the authors' code:
        Weights are ours. Where the trimmed entries cancel exactly, the sign that most entries of
        the scope elect decides, as there; `exact` takes it per tensor.
    """
    if base is None:
        raise MethodError("ties works on task vectors and needs a base")
    if statistics is None:
        known = {"density": density, "threshold_scope": threshold_scope, "weights": weights}
        statistics = Trimming(len(models), known)
        gather(statistics, lambda: [(models, base)])
    return kernels(base).merge(
        models,
        base,
        equal_weights(weights, len(models)),
        Band(statistics.thresholds[0]),
        Election(merge == "mean", statistics.majority),
        scale,
    )
