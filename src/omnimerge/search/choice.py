"""Choose a coefficient from logged answers: no model, no recipe, no labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from omnimerge.errors import SearchError
from omnimerge.search.criteria import Scores, Selection, get_criterion, line, select
from omnimerge.search.distances import EXACT, get_distance
from omnimerge.search.logs import Joined, Log, join

_DIGITS = 9  # steps that differ by rounding errors alone are equal


@dataclass(frozen=True)
class Choice:
    """What was chosen, and from what.

    Attributes:
        joined: the coefficients, the prompts and the answers.
        scores: per coefficient the criterion's value; None where it cannot be chosen.
        selection: the choice.
        criterion: name of the criterion.
        distance: name of the distance.
        per_step: whether distances were divided by the step between the coefficients.
        score: the criterion with its distance, a function of the answers alone.
        ceilings: the largest possible score of a prompt, per coefficient; None where answers are
            not compared exactly.
    """

    joined: Joined
    scores: Scores
    selection: Selection[float]
    criterion: str
    distance: str
    per_step: bool
    score: Callable[[Sequence[Sequence[str]]], Scores]
    ceilings: Scores | None


def choose(
    logs: Mapping[float, Log],
    *,
    criterion: str = "unanimity",
    distance: str = "exact",
    per_step: bool | None = None,
    allow_missing: bool = False,
) -> Choice:
    """Choose the coefficient whose answers change least against its neighbours'.

    Args:
        logs: coefficient -> answers.
        criterion: a key of `CRITERIA`.
        distance: a name that `get_distance` knows.
        per_step: whether distances are divided by the step between the coefficients; None: where
            the steps are not equal.
        allow_missing: whether ids that are not in every log are left out, instead of refused.

    Returns:
        The choice.

    Raises:
        SearchError: for an unknown name, too few coefficients, or logs that do not fit together.
    """
    found, measure = get_criterion(criterion), get_distance(distance)
    if len(logs) < 2:
        raise SearchError(
            f"{len(logs)} logs are too few; give one for each of several coefficients"
        )
    found([["?"]] * len(logs))  # refuses too few points before ids are compared
    joined = join(logs, allow_missing=allow_missing)
    steps = [round(b - a, _DIGITS) for a, b in zip(joined.points, joined.points[1:], strict=False)]
    divide = len(set(steps)) > 1 if per_step is None else per_step
    spacing = [[pair] for pair in zip([0.0, *steps], [*steps, 0.0], strict=True)]
    count = len(joined.points)

    def score(answers: Sequence[Sequence[str]]) -> Scores:
        used = spacing if divide else None
        return found(answers, distance=measure, neighbours=line(count), spacing=used)

    scores = score(joined.answers)
    ceilings = score([[str(n)] for n in range(count)]) if measure.name == EXACT.name else None
    chosen = select(joined.points, scores)
    return Choice(
        joined, scores, chosen, criterion, measure.name, divide, score=score, ceilings=ceilings
    )
