"""PCB-Merging: let the parameters of the tasks compete, and drop those that lose."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from omnimerge.errors import MethodError
from omnimerge.methods._ops import task_vectors
from omnimerge.methods._params import Range
from omnimerge.methods._registry import merge_method
from omnimerge.methods._statistics import Magnitudes, Ranked, Scope, gather, task_vector_blocks

# Share of the entries at either end of the magnitudes that are clipped.
_CLIPPED = 1e-4


class _Competition:
    """The limits of the magnitudes (passes 0 and 1) and of the scores (passes 2 and 3).

    Args:
        models: number of models.
        parameters: `density` and `threshold_scope` of the method.
    """

    passes = 4

    def __init__(self, models: int, parameters: Mapping[str, Any]) -> None:
        self.scope: Scope = "tensor" if parameters["threshold_scope"] == "tensor" else "model"
        density = float(parameters["density"])
        self._magnitudes = Magnitudes(models, _clip_ranks, self.scope)
        self._scores = _Scores(2 * models, lambda n: _score_ranks(n, density), self.scope)
        self._scores.of = self

    def idle(self, number: int) -> bool:
        """Whether the limits are known already."""
        return self._part(number).idle(number % 2)

    def measure(
        self,
        number: int,
        models: Sequence[Tensor],
        base: Tensor | None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Count magnitudes or scores."""
        return self._part(number).measure(number % 2, models, base, counts)

    def add(self, number: int, measured: Tensor) -> None:
        """Sum the counts."""
        self._part(number).add(number % 2, measured)

    def close(self, number: int) -> None:
        """Find the limits."""
        self._part(number).close(number % 2)

    def _part(self, number: int) -> Magnitudes:
        return self._magnitudes if number < 2 else self._scores

    def clipped(self, tau: Tensor) -> Tensor:
        """The magnitudes within their limits, (models, *shape)."""
        high, low = _columns(self._magnitudes.thresholds, tau)
        return tau.abs().clamp(min=low, max=high)

    def scores(self, tau: Tensor) -> Tensor:
        """The product of both balances, before anything is dropped."""
        high, low = _columns(self._magnitudes.thresholds, tau)
        width = torch.where(high > low, high - low, torch.ones_like(high))
        share = (self.clipped(tau) - low) / width
        scores: Tensor = (len(tau) * share.square()).exp() * (tau * tau.sum(dim=0)).tanh()
        return scores

    def winners(self, tau: Tensor) -> Tensor:
        """Scores scaled to [0, 1], the dropped ones being 0."""
        most, least = _columns(self._scores.limits(), tau)
        width = torch.where(most > least, most - least, torch.ones_like(most))
        return (self.scores(tau).clamp(min=least) - least).clamp(max=width) / width


class _Scores(Magnitudes):
    """Order statistics of signed scores: of their positive parts, and of their negative ones."""

    of: _Competition

    def ranked(self, models: Sequence[Tensor], base: Tensor | None) -> Iterator[Ranked]:
        """Give the positive parts of all models, then the negative ones."""
        for tau in task_vector_blocks(models, base):
            scores = self.of.scores(tau)
            yield [*scores.clamp(min=0), *(-scores).clamp(min=0)], None

    def limits(self) -> tuple[Tensor, Tensor]:
        """The largest score and the smallest one that is kept, per model."""
        # Rows of thresholds: ranks 1 and n (the largest), k and n - k + 1 (the last that is kept).
        first, last, kept, rest = (row.chunk(2) for row in self.thresholds)
        return (
            torch.where(first[0] > 0, first[0], -last[1]),
            torch.where(kept[0] > 0, kept[0], -rest[1]),
        )


@merge_method(
    "pcb",
    paper="https://arxiv.org/abs/2410.02396",
    family="task vectors",
    needs_base=True,
    slices="entries",
    statistics=_Competition,
    exact=False,  # of exponentials
)
def pcb(
    models: Sequence[Float[Tensor, "*shape"]],
    base: Float[Tensor, "*shape"] | None = None,
    *,
    density: Annotated[float, Range(0.0, 1.0)] = 0.1,
    scale: Annotated[float, Range(-10.0, 10.0)] = 1.0,
    threshold_scope: Literal["tensor", "model"] = "model",
    statistics: _Competition | None = None,
) -> Float[Tensor, "*shape"]:
    """Weight every entry by how much it matters in its task and agrees with the others.

    a_t = |τ_t| clipped at its outermost 0.01 %;  intra = exp(T · norm(a_t)²), inter =
    tanh(τ_t · Σ_s τ_s), b_t = intra · inter;  s_t = norm(b_t) over its largest entries, 0 for the
    others, norm(x) = (x - min x) / (max x - min x);
    θ = θ_base + λ Σ_t s_t sign(τ_t) a_t / Σ_t s_t

    Args:
        models: one fine-tuned tensor θ_t per model, all of one shape.
        base: the common ancestor's tensor θ_base.
        density: share of entries whose score is kept, the authors' ratio r; they take 0.05 to 0.2.
        scale: the factor λ on the merged task vector; the authors search 0.8 to 2.2.
        threshold_scope: what limits and norms are taken over: the whole `model`, as published, or
            each `tensor`.
        statistics: the limits; provided by the caller where a slice is merged.

    Returns:
        The merged tensor: float32, the shape of the inputs.

    Raises:
        MethodError: if there is no base.

    Reference:
        Du et al. "Parameter Competition Balancing for Model Merging." NeurIPS 2024. §3, and the
        authors' reference file pcb-merging.py.

    Differences from the authors' code:
        None known from that file; other files of theirs clip 1 % and scale τ in `inter`, and the
        text has softmax for both balances.
    """
    if base is None:
        raise MethodError("pcb works on task vectors and needs a base")
    if statistics is None:
        known = {"density": density, "threshold_scope": threshold_scope}
        statistics = _Competition(len(models), known)
        gather(statistics, lambda: [(models, base)])
    tau = task_vectors(models, base)
    winners = statistics.winners(tau)
    merged = (winners * tau.sign() * statistics.clipped(tau)).sum(dim=0)
    return base.float() + scale * merged / winners.sum(dim=0).clamp(min=1e-12)


def _columns(limits: Iterable[Tensor], tau: Tensor) -> tuple[Tensor, ...]:
    """Limits per model, to be compared with (models, *shape)."""
    return tuple(each.to(tau.device).view(-1, *[1] * (tau.ndim - 1)) for each in limits)


def _clip_ranks(numel: int) -> tuple[int, int]:
    """Ranks, from the largest, of the upper and the lower limit of the magnitudes."""
    if numel == 0:
        return 0, 0
    upper = max(0, int(numel * (1 - _CLIPPED) - 1))
    return numel - upper, numel - int(numel * _CLIPPED)


def _score_ranks(numel: int, density: float) -> tuple[int, int, int, int]:
    if numel == 0:
        return 0, 0, 0, 0
    kept = numel - min(int(numel * (1 - density)), numel - 1)
    return 1, numel, kept, numel - kept + 1
