"""How many singular directions should OptMerge keep of each task vector? Table 8 of the paper."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omnimerge.bench.analysis import plan_of
from omnimerge.bench.experiments.descent import Loop
from omnimerge.bench.experiments.result import Curve, Experiment
from omnimerge.bench.experiments.variants import SCALES, score_variants
from omnimerge.bench.line import Line, Report
from omnimerge.checkpoint import AdaptedCheckpoint

NAME = "rank-ratio"
ABOUT = "OptMerge by the share of singular directions that it keeps"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


def run(
    line: Line,
    folder: Path,
    *,
    seed: int,
    ratios: Sequence[float] = RATIOS,
    scales: Sequence[float] = SCALES,
    on_progress: Report,
) -> Experiment:
    """Merge and score.

    Args:
        line: the line.
        folder: a built folder of it.
        seed: of the folder.
        ratios: shares of min(m, n), increasing.
        scales: that λ is chosen from on the validation split.
        on_progress: told about each row.

    Returns:
        One row, and one point of the curve, per share.
    """
    begun = time.perf_counter()
    recipe = line.recipe(folder, "optmerge", {})
    full = not all(isinstance(model, AdaptedCheckpoint) for model in plan_of(recipe).models)
    kind = Loop("adam", "sum", centred=True) if full else Loop("sgd", "mean")
    loops = {f"{ratio:.0%}": replace(kind, ratio=ratio) for ratio in ratios}
    with tempfile.TemporaryDirectory() as scratch:
        subject = line.subject(folder)
        rows = score_variants(
            subject, recipe, loops, Path(scratch), scales=scales, on_progress=on_progress
        )
    averages = tuple(float(row.values[-2] or 0.0) for row in rows)
    result = Experiment(
        name=NAME,
        title="Rank ratio",
        paper="Table 8",
        question=f"OptMerge for {'full fine-tuning' if full else 'LoRA'} by the share k / min(m, n)"
        " of singular directions that is kept of each task vector. λ is chosen on the validation "
        "split. The paper keeps one in as many as there are experts.",
        line=line.name,
        seeds=(seed,),
        settings={"variant": "full" if full else "lora", "experts": len(line.experts)},
        x="share of the directions, %",
        y="average, %",
        curves=(Curve(name="OptMerge", x=tuple(100 * r for r in ratios), y=averages),),
        head="share",
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
    best = result.rows[averages.index(max(averages))].name
    spread = max(averages) - min(averages)
    return [
        f"The best share is {best}; from worst to best it is {spread:.1f} points.",
        "In the paper 20 % is best for five experts (57.43), with 10 % at 56.93 and 50 % at 52.98.",
    ]
