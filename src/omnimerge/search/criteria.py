"""Label-free criteria: how much the answers change around a coefficient. Less is better.

All functions take one list of answers per point, with the answers to the same prompts in the same
order, and return one score per point; None where a point cannot be chosen. Unless told otherwise
the points are a line in the order given, and answers are compared as the published scripts do, by
``str(answer).lower()``: case does not count, everything else does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

from omnimerge.errors import SearchError, suggestion
from omnimerge.search.distances import EXACT, Distance

Answers = Sequence[Sequence[str]]
Scores = list[float | None]
Neighbours = Sequence[Sequence[tuple[int | None, int | None]]]
"""Per point, per axis: the index of the previous point and that of the next."""
Spacing = Sequence[Sequence[tuple[float, float]]]
"""Per point, per axis: the step from the previous point and to the next; 0 where there is none."""

PointT = TypeVar("PointT", float, tuple[float, ...])

_DIGITS = 9  # scores that differ by rounding errors alone must tie
_BOTH, _PREVIOUS = (0, 1), (0,)


@dataclass(frozen=True, slots=True)
class Selection(Generic[PointT]):
    """The chosen point.

    Attributes:
        point: the coefficient, or one per axis.
        score: its score.
        tie_set: all points with this score, increasing; `point` is the first of them.
    """

    point: PointT
    score: float
    tie_set: tuple[PointT, ...]


class Criterion(Protocol):
    """What all criteria are called like; see `unanimity`."""

    def __call__(
        self,
        answers: Answers,
        *,
        distance: Distance = EXACT,
        neighbours: Neighbours | None = None,
        spacing: Spacing | None = None,
    ) -> Scores:
        """Return a score per point."""


def differs(a: str, b: str) -> bool:
    """Return whether two answers differ, case aside.

    Args:
        a: an answer.
        b: another one.

    Returns:
        True unless ``str(a).lower() == str(b).lower()``.
    """
    return EXACT.between((a,), (b,)) != [0.0]


def line(count: int) -> list[list[tuple[int | None, int | None]]]:
    """Return the neighbours of points in a row.

    Args:
        count: how many points there are.

    Returns:
        Per point, for its one axis, the index of the previous point and of the next.
    """
    return [[(i - 1 if i else None, i + 1 if i + 1 < count else None)] for i in range(count)]


def unanimity(
    answers: Answers,
    *,
    distance: Distance = EXACT,
    neighbours: Neighbours | None = None,
    spacing: Spacing | None = None,
) -> Scores:
    """Count the prompts whose answer differs from that at any neighbouring point.

    D_i = Σ_x max_j d(G_i(x), G_j(x)) over the neighbours j of i. In a row, and with a distance of
    0 or 1, this is Σ_x [G_i(x) ≠ G_{i-1}(x) or G_i(x) ≠ G_{i+1}(x)] for the interior points.

    Args:
        answers: per point, the answer to each prompt; at least three points.
        distance: how different two answers are.
        neighbours: per point, per axis, the indices of its neighbours; default: `line`.
        spacing: per point, per axis, the steps to these neighbours. Then every distance is divided
            by its step over the smallest step of that axis, so that points of a refined grid
            can be compared; default: as it is.

    Returns:
        Per point a number in [0, prompts]; None where a neighbour is missing, as at both ends.

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
        With embeddings it adds both neighbours' distances, which is `pairwise`, and a typing error
        stops it before. Several axes, other distances and `spacing` are ours.
    """
    return _scores(answers, 3, distance, neighbours, spacing, _BOTH, max)


def pairwise(
    answers: Answers,
    *,
    distance: Distance = EXACT,
    neighbours: Neighbours | None = None,
    spacing: Spacing | None = None,
) -> Scores:
    """Add up the answers that differ from those at each neighbouring point.

    D_i = Σ_j Σ_x d(G_i(x), G_j(x)) over the neighbours j of i. In a row this is
    DiffCnt(G_i, G_{i-1}) + DiffCnt(G_i, G_{i+1}) for the interior points.

    Args:
        answers: per point, the answer to each prompt; at least three points.
        distance: how different two answers are.
        neighbours: as for `unanimity`.
        spacing: as for `unanimity`.

    Returns:
        Per point a number in [0, neighbours · prompts]; None where a neighbour is missing.

    Raises:
        SearchError: for fewer than three points, or points with different numbers of answers.

    Reference:
        Du et al., CVPR 2025 (see `unanimity`). Algorithm 1.

    Differences from the authors' code:
        The code computes `unanimity` (an "or" per prompt), not this sum. The paper says that
        responses "exactly match"; case does not count here, as in all of their code.
    """
    return _scores(answers, 3, distance, neighbours, spacing, _BOTH, math.fsum)


def backward(
    answers: Answers,
    *,
    distance: Distance = EXACT,
    neighbours: Neighbours | None = None,
    spacing: Spacing | None = None,
) -> Scores:
    """Count the prompts whose answer differs from that at the previous point.

    D_i = Σ_x d(G_i(x), G_{i-1}(x)), for all points but the first; on several axes, the sum over
    the previous points of all of them.

    Args:
        answers: per point, the answer to each prompt; at least two points.
        distance: how different two answers are.
        neighbours: as for `unanimity`; the next points play no part.
        spacing: as for `unanimity`.

    Returns:
        Per point a number in [0, axes · prompts]; None where a previous point is missing.

    Raises:
        SearchError: for fewer than two points, or points with different numbers of answers.

    Reference:
        The code of Du et al., CVPR 2025: ``search/*_qwen_interpolation_diff2.py``, for Qwen2-VL.
        It is in neither the paper's Algorithm 1 nor its Appendix B.

    Differences from the authors' code:
        The script's default distance is 1 minus the mean cosine of sentence embeddings
        (all-MiniLM-L6-v2); here answers are compared exactly, case aside, unless `distance` says
        otherwise, and distances are summed and not averaged.
    """
    return _scores(answers, 2, distance, neighbours, spacing, _PREVIOUS, math.fsum)


CRITERIA: MappingProxyType[str, Criterion] = MappingProxyType(
    {"unanimity": unanimity, "pairwise": pairwise, "backward": backward}
)
"""Name -> function."""

PRESETS: MappingProxyType[str, MappingProxyType[str, Any]] = MappingProxyType(
    {
        name: MappingProxyType(
            {"grid": "0:0.6:0.1", "sample": 100, "criterion": criterion, "distance": "exact"}
        )
        for name, criterion in (("adamms", "unanimity"), ("adamms-qwen", "backward"))
    }
)
"""Name -> the published settings: grid, sample, criterion, distance.

`adamms` is the paper's search as its script computes it. `adamms-qwen` is the script for Qwen2-VL.
That script's default distance is ``embedding`` with all-MiniLM-L6-v2; the preset names ``exact``,
its other strategy, because a preset cannot bring a model along (`embedding:FOLDER` takes one that
is there). It also takes all answers unless told a sample; 100 is the paper's.
"""

TIE_RULE = "smallest score; of equal scores the smallest coefficient"
"""What `select` does, in words, for printing."""


def get_criterion(name: str) -> Criterion:
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


def select(points: Sequence[PointT], scores: Sequence[float | None]) -> Selection[PointT]:
    """Choose a point by the printed rule `TIE_RULE`.

    Args:
        points: the coefficients; on several axes, tuples of them, of which the first axis decides
            first.
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


def _scores(
    answers: Answers,
    least: int,
    distance: Distance,
    neighbours: Neighbours | None,
    spacing: Spacing | None,
    sides: Sequence[int],
    combine: Callable[[Iterable[float]], float],
) -> Scores:
    """Per point the sum over prompts of the combined distances to the neighbours on `sides`."""
    _check(answers, least, neighbours)
    around = line(len(answers)) if neighbours is None else neighbours
    weights = None if spacing is None else _weights(spacing, around)
    known: dict[tuple[int, int], list[float]] = {}  # every pair is asked for from both sides
    scores: Scores = []
    for here, axes in enumerate(around):
        columns = []
        for axis, pair in enumerate(axes):
            for side in sides:
                other = pair[side]
                if other is None:
                    break
                key = (min(here, other), max(here, other))
                if key not in known:
                    known[key] = distance.between(answers[key[0]], answers[key[1]])
                weight = 1.0 if weights is None else weights[here][axis][side]
                columns.append([weight * value for value in known[key]])
        complete = len(columns) == len(axes) * len(sides)
        total = math.fsum(map(combine, zip(*columns, strict=True))) if complete else None
        scores.append(None if total is None else round(total, _DIGITS))
    return scores


def _weights(spacing: Spacing, neighbours: Neighbours) -> list[list[tuple[float, ...]]]:
    """Per point, per axis, per side: the axis's smallest step over this step."""
    smallest: dict[int, float] = {}
    for steps, around in zip(spacing, neighbours, strict=True):
        for axis, (pair, others) in enumerate(zip(steps, around, strict=True)):
            for step, other in zip(pair, others, strict=True):
                if other is not None and step <= 0:
                    raise SearchError(f"a step of {step} between two points; steps are positive")
                if other is not None:
                    smallest[axis] = min(step, smallest.get(axis, step))
    return [
        [
            tuple(round(smallest[axis] / step, _DIGITS) if step else 0.0 for step in pair)
            for axis, pair in enumerate(steps)
        ]
        for steps in spacing
    ]


def _check(answers: Answers, least: int, neighbours: Neighbours | None) -> None:
    if neighbours is None and len(answers) < least:
        raise SearchError(
            f"{len(answers)} points are too few: this criterion compares each with its neighbours; "
            f"give a grid of at least {least} points"
        )
    if neighbours is not None and len(neighbours) != len(answers):
        raise SearchError(
            f"{len(answers)} points but neighbours of {len(neighbours)}; give one entry per point"
        )
    counts = {len(at_point) for at_point in answers}
    if len(counts) > 1 or counts == {0}:
        raise SearchError(
            f"the points have {sorted(counts)} answers; every point needs the same prompts answered"
        )
