"""AdaMMS: interpolate a target with a donor that was mapped onto it."""

from collections.abc import Sequence
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from omnimerge.methods._ops import weighted_sum
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method


@merge_method(
    "adamms",
    paper="https://arxiv.org/abs/2503.23733",
    family="interpolation",
    takes_target=True,
    slices="entries",
    select="language_model",
    models=(2, 2),
)
def adamms(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    alpha: Annotated[float, Range(0.0, 1.0)],
) -> Float[Tensor, "*shape"]:
    """Interpolate between the target and a donor of another architecture.

    θ = (1 - α) · θ_target + α · f(θ_donor), where f is the mapping of `omnimerge map`; tensors
    that f does not reach stay the target's.

    Args:
        models: the target's tensor and the donor's, mapped to the target's shape.
        base: not used: with weights that sum to one the common ancestor cancels out (Equation 1).
        alpha: the donor's share α; 0 returns the target bit for bit. The paper searches
            0, 0.1 ... 0.6 without labels (`omnimerge search`).

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Reference:
        Du et al. "AdaMMS: Model Merging for Heterogeneous Multimodal Large Language Models with
        Unsupervised Coefficients Optimization." CVPR 2025. Equations 1 and 2.

    Differences from the authors' code:
        Alpha is the donor's share, as in the paper; their `mplugowl2cogvlm.py` weights the target
        by it. Their `llava-qwen2qwenvl.py` scales embedding and head, which are not merged, by
        1 - α; here they stay as they are. They compute in the checkpoint's dtype, we in float32.
    """
    target, donor = models
    if alpha == 0:
        return target.float().clone()  # 1 · t + 0 · d would turn -0.0 into 0.0
    return weighted_sum([target, donor], [1.0 - alpha, alpha])
