"""How many singular directions should OptMerge keep of each task vector? Table 8 of the paper."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omnimerge.bench.analysis import plan_of
from omnimerge.bench.experiments.descent import Loop
from omnimerge.bench.experiments.noise import margin, noise
from omnimerge.bench.experiments.result import Curve, Experiment, averages_of
from omnimerge.bench.experiments.variants import score_variants
from omnimerge.bench.grid import SCALES
from omnimerge.bench.line import Line, Report
from omnimerge.checkpoint import AdaptedCheckpoint

NAME = "rank-ratio"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


def run(
    line: Line,
    folder: Path,
    *,
    ratios: Sequence[float] = RATIOS,
    scales: Sequence[float] = SCALES,
    on_progress: Report,
) -> Experiment:
    """Merge and score.

    Args:
        line: the line.
        folder: a built folder of it.
        ratios: shares of min(m, n), increasing.
        scales: that λ is chosen from on the validation split.
        on_progress: told about each row.

    Returns:
        One row, and one point of the curve, per share.
    """
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
    return Experiment(
        name=NAME,
        title="Rank ratio",
        paper="Table 8",
        question=f"OptMerge for {'full fine-tuning' if full else 'LoRA'} by the share k / min(m, n)"
        " of singular directions that is kept of each task vector. λ is chosen on the validation "
        "split. The paper keeps one in as many as there are experts.",
        settings={"variant": "full" if full else "lora", "experts": len(line.experts)},
        x="share of the directions, %",
        y="average, %",
        curves=(Curve(name="OptMerge", x=tuple(100 * r for r in ratios), y=averages),),
        head="share",
        columns=(*line.columns, "Average", "λ"),
        rows=tuple(rows),
    )


def outcome(result: Experiment) -> list[str]:
    """Say what came out.

    Args:
        result: the numbers.

    Returns:
        Sentences.
    """
    averages, deviations = averages_of(result)
    points, spread = margin(result, averages, deviations), max(averages) - min(averages)
    if spread > points:
        rows = zip(result.rows, averages, strict=True)
        near = [row.name for row, average in rows if average >= max(averages) - points]
        best = (
            "best share is" if len(near) == 1 else "best shares, no different beyond the noise, are"
        )
        said = f"The {best} {', '.join(near)}; from worst to best it is {spread:.1f} points."
    else:
        said = f"No share is best: from worst to best it is {spread:.1f} points, within the noise."
    return [
        said,
        "In the paper 20 % is best for five experts (57.43), with 10 % at 56.93 and 50 % at 52.98.",
        noise(points),
    ]
