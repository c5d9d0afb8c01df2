"""Signs, read off the answers alone, of whether a choice can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omnimerge.search.criteria import differs
from omnimerge.search.result import Diagnostics, PointDiagnostics

if TYPE_CHECKING:
    from omnimerge.generate import Response

_MANY_EMPTY = 0.1
_SATURATED = 0.9


def diagnose(
    points: Sequence[float],
    answers: Sequence[Sequence[Response]],
    scores: Sequence[float | None],
    parameter: str = "alpha",
) -> Diagnostics:
    """Describe the answers of a search and warn where its criterion is known to fail.

    Consistency rewards any answer that does not change, right or not. So a model that always says
    the same, or nothing, looks perfectly consistent; and long free text, which changes at every
    step, looks equally inconsistent everywhere.

    Args:
        points: the coefficients.
        answers: per point, one response per prompt, in the same order.
        scores: the criterion's value per point.
        parameter: the keyword that is searched, for the sentences.

    Returns:
        The diagnostics.
    """
    described = tuple(_describe(p, here) for p, here in zip(points, answers, strict=True))
    changed = sum(
        any(differs(response.text, row[0].text) for response in row[1:])
        for row in zip(*answers, strict=True)
    )
    prompts = len(answers[0])
    warnings = [
        *_about_scores(scores, changed, prompts),
        *_about_answers(described, prompts, parameter),
    ]
    return Diagnostics(points=described, changed_prompts=changed, warnings=tuple(warnings))


def _describe(point: float, responses: Sequence[Response]) -> PointDiagnostics:
    count = len(responses)
    return PointDiagnostics(
        alpha=point,
        distinct_rate=len({response.text.lower() for response in responses}) / count,
        empty_rate=sum(not response.text for response in responses) / count,
        mean_tokens=sum(len(response.tokens) for response in responses) / count,
    )


def _about_scores(scores: Sequence[float | None], changed: int, prompts: int) -> list[str]:
    known = [score for score in scores if score is not None]
    warnings = []
    if changed == 0:
        warnings.append(
            "no answer changes anywhere on the grid: the criterion says nothing; use prompts that "
            "the two models answer differently"
        )
    elif len(known) > 1 and len(set(known)) == 1:
        warnings.append(
            f"all points tie at {known[0]:g}: the choice is the tie rule's, not the criterion's; "
            "use more prompts"
        )
    if known and min(known) >= _SATURATED * prompts:
        warnings.append(
            "nearly every answer changes at every step, as long free text does: exact comparison "
            "cannot tell the points apart; ask for short answers or lower max_new_tokens"
        )
    return warnings


def _about_answers(
    described: Sequence[PointDiagnostics], prompts: int, parameter: str
) -> list[str]:
    empty = [d.alpha for d in described if d.empty_rate > _MANY_EMPTY]
    constant = [d.alpha for d in described if prompts > 1 and d.distinct_rate * prompts < 1.5]
    warnings = []
    if empty:
        warnings.append(
            f"more than {_MANY_EMPTY:.0%} of the answers are empty at {parameter} "
            f"{_listed(empty)}: empty answers look consistent without being good; look at the "
            "responses, or raise max_new_tokens"
        )
    if constant:
        warnings.append(
            f"every prompt gets the same answer at {parameter} {_listed(constant)}: constant "
            "answers look consistent without being good; look at the responses"
        )
    return warnings


def _listed(points: Sequence[float]) -> str:
    return ", ".join(f"{point:g}" for point in points)
