"""How far apart two averages must be before a sentence may say that one is better."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omnimerge.bench.experiments.result import Experiment

QUESTIONS = "test questions"
"""The setting that says how many questions, of all tasks together, an average is over."""
UNKNOWN = 1.0
"""Points that count as noise where the number of questions is not known."""


def margin(
    found: Experiment, averages: Sequence[float], deviations: Sequence[float | None] = ()
) -> float:
    """Return how many points count as noise.

    Args:
        found: the experiment.
        averages: that are to be compared, in percent.
        deviations: of the averages over the seeds, if there are several.

    Returns:
        Two binomial standard errors of an average over all questions of all seeds, or the largest
        of the deviations, whichever is more.
    """
    asked = float(found.settings.get(QUESTIONS, 0)) * max(1, len(found.seeds))
    shares = [average / 100 for average in averages]
    chance = [200 * math.sqrt(p * (1 - p) / asked) for p in shares] if asked else [UNKNOWN]
    return max([*chance, *(deviation or 0.0 for deviation in deviations)])


def noise(points: float) -> str:
    """Say it.

    Args:
        points: from `margin`.

    Returns:
        A sentence.
    """
    return f"Differences of up to {points:.1f} points count as noise."
