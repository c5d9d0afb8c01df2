"""Label-free criteria: how much the answers change around a coefficient. Less is better.

All functions take one list of answers per grid point, in the order of the grid, with the answers
to the same prompts in the same order, and return one score per point; None where a point cannot be
chosen. Answers are compared as the published scripts do, by ``str(answer).lower()``: case does not
count, everything else does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from omnimerge.errors import SearchError, suggestion

Answers = Sequence[Sequence[str]]
Scores = list[float | None]


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen point.

    Attributes:
        point: the coefficient.
        score: its score.
        tie_set: all coefficients with this score, increasing; `point` is the first of them.
    """

    point: float
    score: float
    tie_set: tuple[float, ...]


def differs(a: str, b: str) -> bool:
    """Return whether two answers differ, case aside.

    Args:
        a: an answer.
        b: another one.

    Returns:
        True unless ``str(a).lower() == str(b).lower()``.
    """
    return str(a).lower() != str(b).lower()


def unanimity(answers: Answers) -> Scores:
    """Count the prompts whose answer differs from that at either neighbouring point.

    D_i = Σ_x [G_i(x) ≠ G_{i-1}(x) or G_i(x) ≠ G_{i+1}(x)], for the interior points.

    Args:
        answers: per point, the answer to each prompt; at least three points.

    Returns:
        Per point a count in [0, prompts]; None for the two end points.

    Raises:
        SearchError: for fewer than three points, or points with different numbers of answers.

    Reference:
        Du et al. "AdaMMS: Model Merging for Heterogeneous Multimodal Large Language Models with
        Unsupervised Coefficients Optimization." CVPR 2025. Appendix B; as computed by their
        ``search/view_log_delta_perdata_search_limit.py``.

    Differences from the authors' code:
        The script prints all minimisers; `select` chooses one by a fixed rule. It sorts the
        coefficients as texts cut to three characters, so that a grid in steps of 0.05 is thinned
        without a word; here every point counts. It takes the answers as logged; ours come stripped
        of white space at the ends. Its smoothing is off as published (K = 0) and left out here.
    """
    _check(answers, 3)
    return _interior(answers, lambda a, b, c: differs(b, a) or differs(b, c))


def pairwise(answers: Answers) -> Scores:
    """Add up the answers that differ from the previous and those that differ from the next point.

    D_i = DiffCnt(G_i, G_{i-1}) + DiffCnt(G_i, G_{i+1}), for the interior points.

    Args:
        answers: per point, the answer to each prompt; at least three points.

    Returns:
        Per point a count in [0, 2 · prompts]; None for the two end points.

    Raises:
        SearchError: for fewer than three points, or points with different numbers of answers.

    Reference:
        Du et al., CVPR 2025 (see `unanimity`). Algorithm 1.

    Differences from the authors' code:
        The code computes `unanimity` (an "or" per prompt), not this sum. The paper says that
        responses "exactly match"; case does not count here, as in all of their code.
    """
    _check(answers, 3)
    return _interior(answers, lambda a, b, c: differs(b, a) + differs(b, c))


def backward(answers: Answers) -> Scores:
    """Count the prompts whose answer differs from that at the previous point.

    D_i = DiffCnt(G_i, G_{i-1}), for all points but the first.

    Args:
        answers: per point, the answer to each prompt; at least two points.

    Returns:
        Per point a count in [0, prompts]; None for the first point.

    Raises:
        SearchError: for fewer than two points, or points with different numbers of answers.

    Reference:
        The code of Du et al., CVPR 2025: ``search/*_qwen_interpolation_diff2.py``, for Qwen2-VL.
        It is in neither the paper's Algorithm 1 nor its Appendix B.

    Differences from the authors' code:
        The script's default distance is 1 minus the mean cosine of sentence embeddings
        (all-MiniLM-L6-v2); here answers are compared exactly, case aside.
    """
    _check(answers, 2)
    scores: Scores = [None]
    for before, here in itertools.pairwise(answers):
        scores.append(float(sum(map(differs, here, before))))
    return scores


CRITERIA = MappingProxyType({"unanimity": unanimity, "pairwise": pairwise, "backward": backward})
"""Name -> function."""

TIE_RULE = "smallest score; of equal scores the smallest coefficient (nearest to the target)"
"""What `select` does, in words, for printing."""


def get_criterion(name: str) -> Callable[[Answers], Scores]:
    """Return a criterion by name.

    Args:
        name: a key of `CRITERIA`.

    Returns:
        The function.

    Raises:
        SearchError: if there is none of that name.
    """
    if name not in CRITERIA:
        raise SearchError(
            f"unknown criterion {name!r}{suggestion(name, CRITERIA)}; known: {', '.join(CRITERIA)}"
        )
    return CRITERIA[name]


def select(points: Sequence[float], scores: Sequence[float | None]) -> Selection:
    """Choose a point by the printed rule `TIE_RULE`.

    Args:
        points: the coefficients.
        scores: a score per point, None where it cannot be chosen.

    Returns:
        The choice.

    Raises:
        SearchError: if no point can be chosen.
    """
    scored = [(s, p) for p, s in zip(points, scores, strict=True) if s is not None]
    if not scored:
        raise SearchError("no point of the grid can be chosen; give at least three points")
    best, _ = min(scored)
    tied = tuple(sorted(point for score, point in scored if score == best))
    return Selection(tied[0], best, tied)


def _interior(answers: Answers, count: Callable[[str, str, str], int]) -> Scores:
    middle = [
        float(sum(map(count, before, here, after)))
        for before, here, after in zip(answers, answers[1:], answers[2:], strict=False)
    ]
    return [None, *middle, None]


def _check(answers: Answers, least: int) -> None:
    if len(answers) < least:
        raise SearchError(
            f"{len(answers)} points are too few: this criterion compares each with its neighbours; "
            f"give a grid of at least {least} points"
        )
    counts = {len(at_point) for at_point in answers}
    if len(counts) > 1 or counts == {0}:
        raise SearchError(
            f"the points have {sorted(counts)} answers; every point needs the same prompts answered"
        )
