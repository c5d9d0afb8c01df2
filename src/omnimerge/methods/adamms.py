"""AdaMMS: interpolate a target with a donor that was mapped onto it."""

from collections.abc import Sequence
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import weighted_sum
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method


@merge_method(
    "adamms",
    paper="https://arxiv.org/abs/2503.23733",
    family="interpolation",
    takes_target=True,
    slices="entries",
    fused=True,
    select="language_model",
    models=(2, None),
)
def adamms(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    alpha: Annotated[float, Range(0.0, 1.0)],
    weights: Sequence[float] | None = None,
) -> Float[Tensor, "*shape"]:
    """Interpolate between the target and donors of other architectures.

    θ = (1 - α) · θ_target + α · f(θ_donor), where f is the mapping of `omnimerge map`; tensors
    that f does not reach stay the target's. Several donors share α by their weights.

    Args:
        models: the target's tensor and the donors', each mapped to the target's shape.
        base: not used: with weights that sum to one the common ancestor cancels out (Equation 1).
        alpha: the donor's share α; 0 returns the target bit for bit. The paper searches
            0, 0.1 ... 0.6 without labels (`omnimerge search`).
        weights: one per donor; divided by their sum. Default: equal.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if the weights sum to zero.

    Reference:
        Du et al. "AdaMMS: Model Merging for Heterogeneous Multimodal Large Language Models with
        Unsupervised Coefficients Optimization." CVPR 2025. Equations 1 and 2.

    Differences from the authors' code:
        Alpha is the donor's share, as in the paper; their `mplugowl2cogvlm.py` weights the target
        by it. Their `llava-qwen2qwenvl.py` scales embedding and head, which are not merged, by
        1 - α; here they stay as they are. They compute in the checkpoint's dtype, we in float32.
        Their double and triple interpolation are two donors with weights: of the target's chat
        and grounding versions and mPLUG-Owl2, with their coefficients α, β, γ, the shares are
        α(1-β), β and (1-α)(1-β) (double), αγ + β(1-γ), (1-β)(1-γ) and (1-α)γ (triple). Without
        `--with-grounding`, the shares of the double one do not sum to one; there is none here.
    """
    target, *donors = models
    if alpha == 0:
        return target.float().clone()  # 1 · t + 0 · d would turn -0.0 into 0.0
    given = list(weights or [1.0] * len(donors))
    if not sum(given):
        raise MethodError("adamms: the weights sum to zero; give at least one donor a share")
    shares = [alpha * weight / sum(given) for weight in given]
    return weighted_sum([target, *donors], [1.0 - alpha, *shares])
