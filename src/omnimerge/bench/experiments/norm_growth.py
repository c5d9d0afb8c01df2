"""Does the merged task vector grow as it is optimised? Figures 3 and 4 of the paper.

The paper's diagnosis of WUDI under Adam: the loss is lowered by making ‖τ‖ larger along directions
that carry little of the tasks, which wrecks the language; OptMerge's norm stays where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnimerge.bench.analysis import plan_of, task_vectors_of
from omnimerge.bench.experiments.descent import WUDI, Loop, optmerge_loop
from omnimerge.bench.experiments.result import Curve, Experiment
from omnimerge.methods import LowRank

NAME = "norm-growth"
COUNTS = (0, 1, 3, 10, 30, 100, 200, 300)

_WUDI = "WUDI: Adam from the sum"
_FULL = "OptMerge, full: Adam from the sum"
_OPTMERGE = "OptMerge, lora: SGD from the mean"
_SUM, _MEAN = "sum of the task vectors", "mean of the task vectors"


def run(
    recipe: Mapping[str, Any] | Path,
    *,
    counts: Sequence[int] = COUNTS,
) -> Experiment:
    """Minimise, and take the norm on the way.

    Args:
        recipe: what names base and experts, or its YAML file.
        counts: iterations at which the norm is taken, increasing.

    Returns:
        The norms of all merged matrices together.
    """
    plan = plan_of(recipe)
    experts = len(plan.models)
    loops: dict[str, Loop] = {
        _WUDI: WUDI,
        "WUDI's loss: SGD from the sum": Loop("sgd", "sum"),
        _FULL: optmerge_loop(experts, full=True),
        _OPTMERGE: optmerge_loop(experts, full=False),
    }
    squares = {name: [0.0] * len(counts) for name in loops}
    ends = {_SUM: 0.0, _MEAN: 0.0}
    for job in plan.merged:
        if len(job.output.shape) < 2:
            continue
        _, found = task_vectors_of(plan, job)
        deltas = [each.dense() if isinstance(each, LowRank) else each for each in found]
        if not any(each.any() for each in deltas):
            continue
        total = sum(deltas[1:], start=deltas[0].double())
        ends[_SUM] += float(total.square().sum())
        ends[_MEAN] += float((total / experts).square().sum())
        for name, loop in loops.items():
            for i, merged in enumerate(loop.run(deltas, counts)):
                squares[name][i] += float(merged.double().square().sum())
    return Experiment(
        name=NAME,
        title="Norm growth",
        paper="Figures 3 and 4",
        question="Frobenius norm of the merged task vector, all matrices together, while the "
        "losses of WUDI and OptMerge are minimised with the paper's optimisers and rates.",
        settings={"Adam's rate": 1e-5, "SGD's rate": 1e-4, "momentum": 0.9, "experts": experts},
        x="iteration",
        y="norm of the merged task vector",
        log_x=True,
        curves=tuple(
            Curve(name=name, x=tuple(counts), y=tuple(math.sqrt(each) for each in values))
            for name, values in squares.items()
        ),
        levels={name: math.sqrt(value) for name, value in ends.items()},
    )


def outcome(result: Experiment) -> list[str]:
    """Say what came out.

    Args:
        result: the numbers.

    Returns:
        Sentences.
    """
    said = []
    for name in (_WUDI, _FULL, _OPTMERGE):
        curve = result.curve(name)
        if curve.y[0] > 0:
            change = curve.y[-1] / curve.y[0] - 1
            mean = result.levels[_MEAN]
            said.append(
                f"{name}: {change:+.1%} over {curve.x[-1]:g} iterations, to "
                f"{curve.y[-1] / mean:.2f} times the mean of the task vectors."
            )
    wudi, optmerge = result.curve(_WUDI).y, result.curve(_OPTMERGE).y
    grows = wudi[-1] > wudi[0] * 1.01
    flat = not optmerge[0] or abs(optmerge[-1] / optmerge[0] - 1) < 0.1
    if grows and flat:
        return [*said, "As in the paper: WUDI grows under Adam, OptMerge for LoRA stays flat."]
    here = f"WUDI {'grows' if grows else 'does not grow'} and OptMerge for LoRA "
    here += "stays flat" if flat else "does not stay flat"
    return [*said, f"In the paper WUDI grows and OptMerge stays flat; here {here}."]
