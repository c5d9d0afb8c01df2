"""Arcee Fusion: take over the changes that stand out, and only those."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import kth_magnitude
from omnimerge.methods._registry import merge_method


@merge_method(
    "arcee_fusion",
    paper="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
    family="task vectors",
    needs_base=True,
    models=(1, 1),
)
def arcee_fusion(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Take the entries over whose change is an outlier, weighted by how much their row changed.

    i = |τ| · KL(softmax θ_1 ‖ softmax θ_base), the divergence per row;
    θ = θ_base + τ where i ≥ median + 1.5 · (q_75 - q_25) of all i, else θ_base

    Args:
        models: the one tensor θ_1.
        base: the tensor θ_base.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Arcee AI. "Arcee Fusion", announcement of MergeKit 0.1, 2025.

    Differences from the authors' code:
        The divergence is taken in float64; in mergekit's float32 that of close rows is mostly
        rounding, which decides some entries otherwise. Quantiles are interpolated, over all
        entries; mergekit takes the entry below, and where there are more than a million, from
        a random sample.
    """
    if base is None:
        raise MethodError("arcee_fusion fuses a model into a base and needs one")
    origin = base.float()
    if not origin.numel():
        return origin.clone()
    tau = models[0].float() - origin
    # The divergence of close rows is a small difference: float64, or it is mostly rounding.
    ours, theirs = (x.double().log_softmax(dim=-1) for x in (models[0], origin))
    divergence = (ours.exp() * (ours - theirs)).sum(dim=-1, keepdim=origin.ndim > 0)
    importance = (tau.abs() * divergence).clamp(min=0)
    spread = _quantile(importance, 0.75) - _quantile(importance, 0.25)
    limit = float(importance.median()) + 1.5 * spread
    return origin + tau * (importance >= limit)


def _quantile(values: Tensor, share: float) -> float:
    """The quantile of non-negative values, linear between the two next to it."""
    position = share * (values.numel() - 1)
    below = int(position)
    low = kth_magnitude(values, values.numel() - below)
    high = kth_magnitude(values, max(1, values.numel() - below - 1))
    return low + (position - below) * (high - low)
