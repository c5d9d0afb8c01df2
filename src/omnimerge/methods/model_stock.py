"""Model Stock: how far to go from the base, from the angle between fine-tuned models."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import task_vectors
from omnimerge.methods._registry import merge_method


@merge_method(
    "model_stock",
    paper="https://arxiv.org/abs/2403.19522",
    family="task vectors",
    needs_base=True,
    models=(2, None),
)
def model_stock(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Interpolate between the base and the average of the models by the angle between them.

    cos φ = mean over pairs of cos(τ_s, τ_t);  t = T cos φ / (1 + (T - 1) cos φ);
    θ = θ_base + t · mean_t τ_t

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape; at least two.
        base: the common ancestor's tensor θ_base.

    Returns:
        The merged tensor: float32. Pairs with a zero task vector count with a cosine of zero. Where
        the denominator of t is zero, to 1e-6, the merged tensor is the base.

    Raises:
        MethodError: if there is no base.

    Reference:
        Jang et al. "Model Stock: All we need is just a few fine-tuned models." ECCV 2024.
        Equation 8 of its appendix for T models (Equation 1 for two).

    Differences from the authors' code:
        None known. The angle is taken per tensor, as there. mergekit divides by at least 1e-6 for
        the cosine, which is too small where the norms of two task vectors multiply to less.
    """
    if base is None:
        raise MethodError("model_stock works on task vectors and needs a base")
    tau = task_vectors(models, base)
    flat = tau.flatten(start_dim=1).double() if tau.ndim > 1 else tau[:, None].double()
    units = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-300)
    pairs = list(itertools.combinations(range(len(models)), 2))
    cosine = torch.stack([units[i] @ units[j] for i, j in pairs]).mean()
    count = len(models)
    denominator = float(1 + (count - 1) * cosine)
    # Task vectors that cancel, such as two opposite ones, give no ratio, and nothing to scale.
    ratio = count * float(cosine) / denominator if abs(denominator) > 1e-6 else 0.0
    return base.float() + ratio * tau.mean(dim=0)
