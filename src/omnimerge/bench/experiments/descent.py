"""The documented loops of WUDI and OptMerge, with every choice that tells the two apart open.

Both minimise Σ_t ‖(τ - centre_t) A_tᵀ‖² / ‖τ_t‖², whose gradient is 2 (τ C - D). The registered
methods fix the choices, and evaluate what has a closed form; here each is one argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omnimerge.methods._ops import adam_quadratic, main_directions, pull_towards

ADAM_RATE, SGD_RATE, MOMENTUM, ITERATIONS = 1e-5, 1e-4, 0.9, 300  # the paper's, §5.1


@dataclass(frozen=True)
class Loop:
    """One way to minimise the loss.

    Attributes:
        optimiser: Adam, or SGD with momentum.
        start: the sum or the mean of the task vectors.
        ratio: share of min(m, n) singular directions that are kept of each task vector; 1: all.
        centred: whether what is kept is of the task vectors less their mean, and the mean is put
            back, as OptMerge does for full fine-tuning.
        iterations: steps.
    """

    optimiser: Literal["adam", "sgd"]
    start: Literal["sum", "mean"]
    ratio: float = 1.0
    centred: bool = False
    iterations: int = ITERATIONS

    def run(self, deltas: Sequence[Tensor], counts: Sequence[int] = ()) -> list[Tensor]:
        """Minimise.

        Args:
            deltas: the task vectors τ_t of one matrix.
            counts: numbers of steps, increasing; default: `iterations` alone.

        Returns:
            The merged task vector after each of the counts.
        """
        tau = torch.stack([delta.float().flatten(1) for delta in deltas])
        start = tau.sum(dim=0) if self.start == "sum" else tau.mean(dim=0)
        pull, rows = self._problem(tau)
        counts = counts or [self.iterations]
        if self.optimiser == "adam":
            found = [adam_quadratic(start, pull, rows, count, ADAM_RATE) for count in counts]
        else:
            found = _sgd(start, pull, rows, counts)
        return [each.view(deltas[0].shape) for each in found]

    def _problem(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """D, and the rows of A_t / ‖τ_t‖."""
        kept = int(min(tau.shape[1:]) * self.ratio + 1e-9)
        mean = tau.mean(dim=0)
        centres, rows = [], []
        for each in tau:
            _, _, low = main_directions(each, kept)
            rows.append((low / each.double().norm()).float() if each.any() else low.float())
            moved = each - mean if self.centred else each
            left, _, right = main_directions(moved, kept)
            centres.append((left @ right).float() + (mean if self.centred else 0))
        return pull_towards(centres, rows), torch.cat(rows)


def _sgd(start: Tensor, pull: Tensor, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The loop of the published code: v ← μ v + g, τ ← τ - rate · v."""
    tau, velocity, found = start.clone(), torch.zeros_like(start), []
    for step in range(max(counts) + 1):
        found += [tau.clone()] * list(counts).count(step)
        velocity = MOMENTUM * velocity + 2 * ((tau @ rows.T) @ rows - pull)
        tau = tau - SGD_RATE * velocity
    return found


WUDI = Loop("adam", "sum")


def optmerge_loop(experts: int, *, full: bool) -> Loop:
    """Return OptMerge's choices.

    Args:
        experts: how many.
        full: for fully fine-tuned experts; else for LoRA.

    Returns:
        The loop.
    """
    return Loop("adam" if full else "sgd", "sum" if full else "mean", 1 / experts, centred=full)
