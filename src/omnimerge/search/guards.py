"""Signs, read off the answers alone, of whether a choice can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from omnimerge.search.criteria import differs
from omnimerge.search.result import Bootstrap, Diagnostics, NoiseFloor, PointDiagnostics, label

if TYPE_CHECKING:
    from omnimerge.generate import Response

_MANY_EMPTY = 0.1
_SATURATED = 0.9


def diagnose(
    points: Sequence[Mapping[str, float]],
    answers: Sequence[Sequence[Response]],
    scores: Sequence[float | None],
    *,
    target: Sequence[Response] | None = None,
    donor: Sequence[Response] | None = None,
    noise: NoiseFloor | None = None,
    bootstrap: Bootstrap | None = None,
    notes: Sequence[str] = (),
) -> Diagnostics:
    """Describe the answers of a search and warn where its criterion is known to fail.

    Consistency rewards any answer that does not change, right or not. So a model that always says
    the same, or nothing, looks perfectly consistent; and long free text, which changes at every
    step, looks equally inconsistent everywhere.

    Args:
        points: the points, axis -> coefficient.
        answers: per point, one response per prompt, in the same order.
        scores: the criterion's value per point.
        target: the target's own answers, where they are known.
        donor: the donor's own answers, where they are known.
        noise: what `noise_floor` found.
        bootstrap: what `resampled` found.
        notes: checks that could not be made.

    Returns:
        The diagnostics.
    """
    described = tuple(
        _describe(p, here, target, donor) for p, here in zip(points, answers, strict=True)
    )
    changed = sum(
        any(differs(response.text, row[0].text) for response in row[1:])
        for row in zip(*answers, strict=True)
    )
    prompts = len(answers[0])
    warnings = [
        *_about_scores(scores, changed, prompts),
        *_about_answers(described, prompts),
        *_about_noise(noise, scores),
    ]
    return Diagnostics(
        points=described,
        changed_prompts=changed,
        noise=noise,
        bootstrap=bootstrap,
        warnings=tuple(warnings),
        notes=tuple(notes),
    )


def noise_floor(
    point: Mapping[str, float], once: Sequence[Response], again: Sequence[Response]
) -> NoiseFloor:
    """Compare the answers of one point that was answered twice.

    Args:
        point: the point.
        once: its answers.
        again: its answers, computed anew without drafts.

    Returns:
        How many differ.
    """
    differing = sum(differs(a.text, b.text) for a, b in zip(once, again, strict=True))
    return NoiseFloor(values=dict(point), prompts=len(once), differing=differing)


def resampled(
    points: Sequence[Mapping[str, float]],
    answers: Sequence[Sequence[str]],
    score: Callable[[Sequence[Sequence[str]]], Sequence[float | None]],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Bootstrap | None:
    """Choose again on prompts drawn with replacement.

    Args:
        points: the points, in the order of the tie rule.
        answers: per point, the answer to each prompt.
        score: the criterion, with everything but the answers.
        samples: how many draws.
        seed: of the draws.

    Returns:
        How the choice varies; None where no point can be chosen.
    """
    prompts = len(answers[0])
    rows = [score([[at_point[j]] for at_point in answers]) for j in range(prompts)]
    known = [i for i in range(len(points)) if all(row[i] is not None for row in rows)]
    if not known:
        return None
    table = np.array([[row[i] for i in known] for row in rows], dtype=float)
    draws = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, size=samples)
    totals = draws @ table
    # Sums of fractions differ in their last bits; what differs by less is a tie.
    chosen = np.argmin(np.round(totals, 9), axis=1)  # the first of equal ones: the tie rule
    whole = int(np.argmin(np.round(table.sum(axis=0), 9)))
    values = {name: np.array([points[i][name] for i in known])[chosen] for name in points[0]}
    return Bootstrap(
        samples=samples,
        interval={
            name: (float(np.quantile(v, 0.025)), float(np.quantile(v, 0.975)))
            for name, v in values.items()
        },
        same=float(np.mean(chosen == whole)),
    )


def _describe(
    point: Mapping[str, float],
    responses: Sequence[Response],
    target: Sequence[Response] | None,
    donor: Sequence[Response] | None,
) -> PointDiagnostics:
    count = len(responses)
    return PointDiagnostics(
        values=dict(point),
        like_target=_alike(responses, target),
        like_donor=_alike(responses, donor),
        distinct_rate=len({response.text.lower() for response in responses}) / count,
        empty_rate=sum(not response.text for response in responses) / count,
        mean_tokens=sum(len(response.tokens) for response in responses) / count,
    )


def _alike(ours: Sequence[Response], theirs: Sequence[Response] | None) -> float | None:
    if theirs is None:
        return None
    same = sum(not differs(a.text, b.text) for a, b in zip(ours, theirs, strict=True))
    return same / len(ours)


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


def _about_noise(noise: NoiseFloor | None, scores: Sequence[float | None]) -> list[str]:
    known = sorted(score for score in scores if score is not None)
    if not noise or not noise.differing or len(known) < 2:
        return []
    if noise.differing < known[-1] - known[0]:
        return []
    return [
        f"{noise.differing} of {noise.prompts} answers differ when nothing but chance does, which "
        f"is as much as the scores do ({known[0]:g} to {known[-1]:g}): the choice may be chance; "
        "use more prompts"
    ]


def _about_answers(described: Sequence[PointDiagnostics], prompts: int) -> list[str]:
    empty = [d.values for d in described if d.empty_rate > _MANY_EMPTY]
    constant = [d.values for d in described if prompts > 1 and d.distinct_rate * prompts < 1.5]
    warnings = []
    if empty:
        warnings.append(
            f"more than {_MANY_EMPTY:.0%} of the answers are empty at {_listed(empty)}: empty "
            "answers look consistent without being good; look at the responses, or raise "
            "max_new_tokens"
        )
    if constant:
        warnings.append(
            f"every prompt gets the same answer at {_listed(constant)}: constant answers look "
            "consistent without being good; look at the responses"
        )
    return warnings


def _listed(points: Sequence[Mapping[str, float]]) -> str:
    if len(points[0]) > 1:
        return "; ".join(label(point) for point in points)
    return f"{next(iter(points[0]))} {', '.join(label(point) for point in points)}"
