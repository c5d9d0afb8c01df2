"""From WUDI to OptMerge, one change after the other: Table 4 of the paper."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from omnimerge.bench.experiments.descent import WUDI, Loop
from omnimerge.bench.experiments.noise import margin, noise
from omnimerge.bench.experiments.result import Experiment, averages_of
from omnimerge.bench.experiments.variants import score_variants
from omnimerge.bench.grid import SCALES
from omnimerge.bench.line import Line, Report

NAME = "ablation"
ROWS = ("WUDI", "+ SGD", "+ mean init", "+ low rank (OptMerge, LoRA variant)")
QUESTION = (
    "WUDI with Adam from the sum of the task vectors, and what OptMerge changes about it for LoRA "
    "experts, each row on top of the one before. λ is chosen on the validation split."
)
_OLD_ROW = "+ low rank (OptMerge)"  # in files of before the variant was told


def run(
    line: Line, folder: Path, *, scales: Sequence[float] = SCALES, on_progress: Report
) -> Experiment:
    """Merge and score.

    Args:
        line: the line.
        folder: a built folder of it.
        scales: that λ is chosen from on the validation split.
        on_progress: told about each row.

    Returns:
        One row per step from WUDI to OptMerge.
    """
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
    return Experiment(
        name=NAME,
        title="Ablation",
        paper="Table 4",
        question=QUESTION,
        settings={"iterations": WUDI.iterations, "experts": experts},
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
    points = margin(result, averages, deviations)
    said = [
        f"{row.name}: {average - averages[0]:+.1f} points against WUDI."
        for row, average in zip(result.rows[1:], averages[1:], strict=True)
    ]
    gain = averages[-1] - averages[0]
    if gain > points:
        said.append("As in the paper, all three changes together are better than WUDI.")
    else:
        here = "they are worse" if gain < -points else "the difference is within the noise"
        said.append(f"In the paper all three changes together are better than WUDI; here {here}.")
    step = averages[2] - averages[1]
    said.append(
        f"The paper's largest step is the mean as the start; here it is worth {step:+.1f} points, "
        f"and low rank {averages[3] - averages[2]:+.1f}."
    )
    return [*said, _VARIANT, noise(points)]


_VARIANT = (
    "The paper ran this ablation on its LoRA line; for fully fine-tuned experts its OptMerge is "
    "another variant: Adam from the sum, on centred task vectors."
)


def as_now(saved: Experiment) -> Experiment:
    """Say of an experiment that was saved before what is said now; the numbers stay.

    Args:
        saved: an ablation.

    Returns:
        The same numbers; with the present label, question and sentences.
    """
    if _OLD_ROW not in [row.name for row in saved.rows]:
        return saved
    rows = tuple(
        row.model_copy(update={"name": ROWS[-1]}) if row.name == _OLD_ROW else row
        for row in saved.rows
    )
    renamed = saved.model_copy(update={"rows": rows, "question": QUESTION})
    return renamed.model_copy(update={"outcome": tuple(outcome(renamed))})
