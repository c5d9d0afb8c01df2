"""RobustMerge: merge the factors of LoRA adapters, keeping the direction of their updates."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._low_rank import LowRank
from omnimerge.methods._ops import equal_weights, task_vectors
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method


def _merge_factors(
    deltas: Sequence[LowRank],
    *,
    weights: Sequence[float] | None = None,
    density: float = 0.2,
    top_share: float = 0.2,
    factor: float = 2.0,
    scale: float = 1.0,
) -> LowRank:
    """Merge the factors of one matrix; see `robustmerge`."""
    given = equal_weights(weights, len(deltas))
    changed = [(d, w) for d, w in zip(deltas, given, strict=True) if d.left.shape[1]]
    if not changed:
        return deltas[0]
    ranks = sorted({delta.left.shape[1] for delta, _ in changed})
    if len(ranks) > 1:
        raise MethodError(f"robustmerge needs adapters of one rank, not of {ranks}")
    right = torch.zeros_like(changed[0][0].right)
    left = torch.zeros_like(changed[0][0].left)
    total = right.new_zeros(ranks[0])
    for delta, weight in changed:
        pruned = _largest(delta.right, density)
        strengths = _strengths(delta.right, pruned, top_share)
        right += factor * weight * pruned
        left += factor * weight * strengths * _largest(delta.left, density)
        total += strengths
    return LowRank(scale * left / total, right)


@merge_method(
    "robustmerge",
    paper="https://arxiv.org/abs/2502.17159",
    family="LoRA experts",
    needs_base=True,
    select="linear",
    low_rank=_merge_factors,
    adapters_only=True,
)
def robustmerge(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    weights: Annotated[Sequence[float] | None, Range(-10.0, 10.0)] = None,
    density: Annotated[float, Range(0.0, 1.0)] = 0.2,
    top_share: Annotated[float, Range(0.0, 1.0)] = 0.2,
    factor: Annotated[float, Range(0.0, 10.0)] = 2.0,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
) -> Float[Tensor, "*shape"]:
    """Prune both factors, rescale weak directions, and add them up.

    τ_t = B_t A_t; Â, B̂ keep the entries of largest magnitude;  s_tk = ‖A_t[k]‖₁ / ‖Â_t[k]‖₁ for
    every direction k, raised to the smallest of its largest ones;  A = Σ_t f w_t Â_t;
    B[:, k] = Σ_t f w_t s_tk B̂_t[:, k] / Σ_t s_tk;  θ = θ_base + λ B A

    Args:
        models: for tensors that the adapters store whole, one per model, all of one shape; the
            factors of the others are merged as above.
        base: the common ancestor's tensor θ_base.
        weights: one weight w_t per model; default: 1 each.
        density: share of entries of each factor that is kept; 0.2 in the code.
        top_share: share of the largest s of a task that stay as they are; the others are raised
            to the smallest of these. 0.2 in the code.
        factor: the factor f on either side, so that the product has its square; 2 in the code.
        scale: the factor λ on the merged task vector; ours.

    Returns:
        The merged tensor: float32. Tensors that the adapters store whole get
        θ_base + λ · mean_t τ_t.

    Raises:
        MethodError: if there is no base, or adapters have different ranks.

    Reference:
        Zeng et al. "RobustMerge: Parameter-Efficient Model Merging for MLLMs with Direction
        Robustness." NeurIPS 2025; formulas from its code, which has more constants than the text.

    Differences from the authors' code:
        s belongs to the factors of its own matrix, where the code uses that of the A read last. A
        direction that is pruned whole gets s = 1, where the code divides by zero. B includes α / r.
        Adapters that do not touch a matrix are left out of its sums.
    """
    if base is None:
        raise MethodError("robustmerge works on task vectors and needs a base")
    return base.float() + scale * task_vectors(models, base).mean(dim=0)


def _largest(factor: Tensor, density: float) -> Tensor:
    """Zero what is smaller than the ⌊(1 - density) n⌋-th smallest magnitude."""
    position = int(factor.numel() * (1 - density))
    if position == 0:
        return factor
    limit = factor.abs().flatten().kthvalue(position).values
    return factor * (factor.abs() >= limit) if density > 0 else torch.zeros_like(factor)


def _strengths(whole: Tensor, pruned: Tensor, top_share: float) -> Tensor:
    """S of every direction: L1 norm before by after pruning, small ones raised."""
    before, after = whole.abs().sum(dim=1), pruned.abs().sum(dim=1)
    found = torch.where(after > 0, before / after.clamp(min=1e-30), torch.ones_like(before))
    place = min(int(len(found) * (1 - top_share)), len(found) - 1)
    return found.clamp(min=float(found.sort().values[place]))
