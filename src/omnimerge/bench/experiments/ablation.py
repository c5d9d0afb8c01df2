"""From WUDI to OptMerge, one change after the other: Table 4 of the paper."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from omnimerge.bench.experiments.descent import WUDI, Loop
from omnimerge.bench.experiments.result import Experiment
from omnimerge.bench.experiments.variants import SCALES, score_variants
from omnimerge.bench.line import Line, Report

NAME = "ablation"
ABOUT = "WUDI, + SGD, + mean as the start, + low rank = OptMerge for LoRA"
ROWS = ("WUDI", "+ SGD", "+ mean init", "+ low rank (OptMerge)")


def run(
    line: Line, folder: Path, *, seed: int, scales: Sequence[float] = SCALES, on_progress: Report
) -> Experiment:
    """Merge and score.

    Args:
        line: the line.
        folder: a built folder of it.
        seed: of the folder.
        scales: that λ is chosen from on the validation split.
        on_progress: told about each row.

    Returns:
        One row per step from WUDI to OptMerge.
    """
    begun = time.perf_counter()
    recipe = line.recipe(folder, "wudi", {})
    experts = len(line.experts)
    steps = (WUDI, Loop("sgd", "sum"), Loop("sgd", "mean"), Loop("sgd", "mean", 1 / experts))
    with tempfile.TemporaryDirectory() as scratch:
        rows = score_variants(
            line.subject(folder),
            recipe,
            dict(zip(ROWS, steps, strict=True)),
            Path(scratch),
            scales=scales,
            on_progress=on_progress,
        )
    result = Experiment(
        name=NAME,
        title="Ablation",
        paper="Table 4",
        question="WUDI with Adam from the sum of the task vectors, and what OptMerge changes about "
        "it, each row on top of the one before. λ is chosen on the validation split.",
        line=line.name,
        seeds=(seed,),
        settings={"iterations": WUDI.iterations, "experts": experts},
        columns=(*line.columns, "Average", "λ"),
        rows=tuple(rows),
    )
    return result.model_copy(
        update={"outcome": tuple(outcome(result)), "seconds": time.perf_counter() - begun}
    )


def outcome(result: Experiment) -> list[str]:
    """Say what came out.

    Args:
        result: the numbers.

    Returns:
        Sentences.
    """
    averages = [row.values[-2] or 0.0 for row in result.rows]
    said = [
        f"{row.name}: {average - averages[0]:+.1f} points against WUDI."
        for row, average in zip(result.rows[1:], averages[1:], strict=True)
    ]
    if averages[-1] > averages[0]:
        said.append("As in the paper, all three changes together are better than WUDI.")
    else:
        said.append("In the paper all three changes together are better than WUDI; not so here.")
    step = averages[2] - averages[1]
    said.append(
        f"The paper's largest step is the mean as the start; here it is worth {step:+.1f} points, "
        f"and low rank {averages[3] - averages[2]:+.1f}."
    )
    return said
