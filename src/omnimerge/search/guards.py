"""Signs, read off the answers alone, of whether a choice can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from omnimerge.search.criteria import differs
from omnimerge.search.result import Bootstrap, Diagnostics, NoiseFloor, PointDiagnostics, label

if TYPE_CHECKING:
    from omnimerge.generate import Response

_MANY_EMPTY = 0.1
_SATURATED = 0.9
_COLLAPSED = 0.95


def diagnose(
    points: Sequence[Mapping[str, float]],
    answers: Sequence[Sequence[Response]],
    scores: Sequence[float | None],
    *,
    texts: Sequence[Sequence[str]] | None = None,
    ceilings: Sequence[float | None] | None = None,
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
        texts: what the distance compared, per point and prompt, where that is not the answers: then
            nothing is said about their texts.
        ceilings: the largest possible score per prompt, per point; None where answers are not
            compared exactly.
        target: the target's own answers, where they are known.
        donor: the donor's own answers, where they are known.
        noise: what `noise_floor` found.
        bootstrap: what `resampled` found.
        notes: checks that could not be made.

    Returns:
        The diagnostics.
    """
    compared = [[r.text for r in here] for here in answers] if texts is None else texts
    changed = sum(
        any(differs(text, row[0]) for text in row[1:]) for row in zip(*compared, strict=True)
    )
    prompts = len(answers[0])
    described = [PointDiagnostics(values=dict(point)) for point in points]
    about_answers: list[str] = []
    if texts is None:
        described = [
            _describe(p, here, target, donor) for p, here in zip(points, answers, strict=True)
        ]
        about_answers = [*_about_empty(described), *_about_collapse(points, answers, target)]
    warnings = [
        *_about_scores(points, scores, changed),
        *_about_ceilings(scores, ceilings, prompts),
        *about_answers,
        *_about_noise(noise, scores),
    ]
    return Diagnostics(
        points=tuple(described),
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
        How the choice varies; None where fewer than two points can be chosen.
    """
    prompts = len(answers[0])
    rows = [score([[at_point[j]] for at_point in answers]) for j in range(prompts)]
    known = [i for i in range(len(points)) if all(row[i] is not None for row in rows)]
    if len(known) < 2:
        return None
    table = np.array([[row[i] for i in known] for row in rows], dtype=float)
    random, shares = np.random.default_rng(seed), np.full(prompts, 1 / prompts)
    # One at a time: all draws of a log of 100,000 prompts would take a gigabyte.
    draws = [random.multinomial(prompts, shares) @ table for _ in range(samples)]
    # Sums of fractions differ in their last bits; what differs by less is a tie.
    totals = np.round(np.array(draws), 9)
    chosen = np.argmin(totals, axis=1)  # the first of equal ones: the tie rule
    alone = (totals == totals.min(axis=1, keepdims=True)).sum(axis=1) == 1
    whole = int(np.argmin(np.round(table.sum(axis=0), 9)))
    values = {name: np.array([points[i][name] for i in known])[chosen] for name in points[0]}
    return Bootstrap(
        samples=samples,
        interval={
            name: (float(np.quantile(v, 0.025)), float(np.quantile(v, 0.975)))
            for name, v in values.items()
        },
        same=float(np.mean((chosen == whole) & alone)),
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
        empty_rate=sum(not response.text.strip() for response in responses) / count,
        mean_tokens=sum(len(response.tokens) for response in responses) / count,
        mean_characters=sum(len(response.text) for response in responses) / count,
    )


def _alike(ours: Sequence[Response], theirs: Sequence[Response] | None) -> float | None:
    if theirs is None:
        return None
    same = sum(not differs(a.text, b.text) for a, b in zip(ours, theirs, strict=True))
    return same / len(ours)


def _about_scores(
    points: Sequence[Mapping[str, float]], scores: Sequence[float | None], changed: int
) -> list[str]:
    known = [score for score in scores if score is not None]
    if changed == 0:
        return [
            "no answer changes anywhere on the grid: the criterion says nothing; use prompts that "
            "the two models answer differently"
        ]
    if len(known) == 1:
        return [
            "only one point has the neighbours that the criterion compares with, so it is chosen "
            "whatever the answers are; give a longer grid"
        ]
    tied = [p for p, s in zip(points, scores, strict=True) if known and s == min(known)]
    if len(tied) < 2:
        return []
    which = "all points" if len(tied) == len(known) else _listed(tied)
    return [
        f"{which} tie at {min(known):g}: the choice among them is the tie rule's, not the "
        "criterion's; use more prompts"
    ]


def _about_ceilings(
    scores: Sequence[float | None], ceilings: Sequence[float | None] | None, prompts: int
) -> list[str]:
    known = [
        (score, ceiling * prompts)
        for score, ceiling in zip(scores, ceilings or (), strict=False)
        if score is not None and ceiling is not None
    ]
    if not known or any(score < _SATURATED * most for score, most in known):
        return []
    return [
        "nearly every answer changes at every step, as long free text does: exact comparison "
        "cannot tell the points apart; ask for short answers or lower max_new_tokens"
    ]


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


def _about_empty(described: Sequence[PointDiagnostics]) -> list[str]:
    empty = [d.values for d in described if (d.empty_rate or 0.0) > _MANY_EMPTY]
    if not empty:
        return []
    return [
        f"more than {_MANY_EMPTY:.0%} of the answers are empty at {_listed(empty)}: empty "
        "answers look consistent without being good; look at the responses, or raise "
        "max_new_tokens"
    ]


def _about_collapse(
    points: Sequence[Mapping[str, float]],
    answers: Sequence[Sequence[Response]],
    target: Sequence[Response] | None,
) -> list[str]:
    usual = 0.0 if target is None else _largest_share(target)
    least = _COLLAPSED if usual < _COLLAPSED else 1.0
    shares = [_largest_share(here) for here in answers]
    same = [point for point, share in zip(points, shares, strict=True) if share >= least]
    if not same or len(answers[0]) < 2:
        return []
    constant = all(share == 1 for share in shares if share >= least)
    what = "every prompt gets" if constant else f"{_COLLAPSED:.0%} of the prompts or more get"
    return [
        f"{what} the same answer at {_listed(same)}: constant answers look consistent without "
        "being good; look at the responses"
    ]


def _largest_share(answers: Sequence[Response]) -> float:
    """How many of the answers are the most frequent one."""
    counts = Counter(response.text.strip().lower() for response in answers)
    return max(counts.values()) / len(answers)


def _listed(points: Sequence[Mapping[str, float]]) -> str:
    if len(points[0]) > 1:
        return "; ".join(label(point) for point in points)
    return f"{next(iter(points[0]))} {', '.join(label(point) for point in points)}"
