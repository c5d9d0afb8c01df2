"""MetaGPT: weights of the task vectors from their norms alone."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._kernels import kernels
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method
from omnimerge.methods._statistics import Scope, gather, task_vector_blocks


class _SquaredNorms:
    """‖τ_t‖² of whole models, in float64."""

    scope: Scope = "model"
    passes = 1

    def __init__(self, models: int, parameters: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.values = torch.zeros(models, dtype=torch.float64)

    def idle(self, number: int) -> bool:  # noqa: ARG002
        """Whether there is nothing to find out: never."""
        return False

    def measure(
        self,
        number: int,  # noqa: ARG002
        models: Sequence[Tensor],
        base: Tensor | None,
        counts: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Sum the squares of one tensor."""
        blocks = task_vector_blocks(models, base)
        sums = [tau.double().square().sum(dim=1) for tau in blocks]
        return torch.stack(sums).sum(dim=0) if sums else torch.zeros_like(self.values)

    def add(self, number: int, measured: Tensor) -> None:  # noqa: ARG002
        """Add them up."""
        self.values += measured.to(self.values.device)

    def close(self, number: int) -> None:
        """Nothing to do."""


@merge_method(
    "metagpt",
    paper="https://arxiv.org/abs/2406.11385",
    family="task vectors",
    needs_base=True,
    slices="entries",
    fused=True,
    statistics=_SquaredNorms,
)
def metagpt(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    statistics: _SquaredNorms | None = None,
) -> Float[Tensor, "*shape"]:
    """Weight each task vector by its share of the squared norms.

    w_t = ‖τ_t‖² / Σ_s ‖τ_s‖², over the whole model;  θ = θ_base + λ Σ_t w_t τ_t

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        scale: a factor λ on the merged task vector; 1 in the paper.
        statistics: the squared norms of the whole models, provided by the caller.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Zhou et al. "MetaGPT: Merging Large Language Models Using Model Exclusive Task Arithmetic."
        EMNLP 2024. Equation 16.

    Differences from the authors' code:
        The norms are summed in float64. `scale` is ours.
    """
    if base is None:
        raise MethodError("metagpt works on task vectors and needs a base")
    if statistics is None:
        statistics = _SquaredNorms(len(models), {})
        gather(statistics, lambda: [(models, base)])
    shares = statistics.values / statistics.values.sum().clamp(min=1e-300)
    return kernels(base).combine(models, base, [scale * share for share in shares.tolist()])
