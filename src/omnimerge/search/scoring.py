"""A criterion with its distance, applied to the points of a space."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omnimerge.errors import SearchError
from omnimerge.search.criteria import get_criterion
from omnimerge.search.distances import EXACT, Distance, get_distance
from omnimerge.search.space import Neighbours, Point, Space

if TYPE_CHECKING:
    from omnimerge.generate import Response

TOKENS = "tokens"
Scores = Sequence[float | None]


class TokenDisagreement:
    """The share of places where two models, following one answer, choose another next token."""

    name = TOKENS

    def between(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        """Compare lists of next tokens, each a text of numbers.

        Args:
            a: per prompt, the next tokens at one point.
            b: the same at another.

        Returns:
            Per prompt a share in [0, 1]; 0 where there are no tokens.
        """
        return [self._share(x.split(), y.split()) for x, y in zip(a, b, strict=True)]

    @staticmethod
    def _share(a: Sequence[str], b: Sequence[str]) -> float:
        return sum(map(str.__ne__, a, b)) / len(a) if a else 0.0


@dataclass(frozen=True)
class Scoring:
    """How points are scored.

    Attributes:
        criterion: name of the criterion.
        distance: how two answers are compared.
        per_step: whether distances are divided by the step; None: where steps are not equal.
    """

    criterion: str
    distance: Distance
    per_step: bool | None

    @classmethod
    def of(cls, criterion: str, distance: str, per_step: bool | None) -> Scoring:
        """Look up criterion and distance.

        Args:
            criterion: its name.
            distance: its name.
            per_step: see the class.

        Returns:
            The scoring.

        Raises:
            SearchError: if there is no criterion or distance of that name.
        """
        get_criterion(criterion)
        found = TokenDisagreement() if distance == TOKENS else get_distance(distance)
        return cls(criterion, found, per_step)

    @property
    def follows(self) -> bool:
        """Whether models follow given answers instead of giving their own."""
        return self.distance.name == TOKENS

    def check(self, space: Space, *, refine: int, trials: int | None) -> None:
        """Refuse a space in which nothing could be chosen, before anything is loaded.

        Args:
            space: the space.
            refine: how often it will be refined.
            trials: how many of its points will be tried; None for all.

        Raises:
            SearchError: with what to change.
        """
        if not self.choosable(space):
            raise SearchError(
                f"no point of {space.text} has the neighbours that {self.criterion} compares with; "
                "give at least three values for each axis"
            )
        if refine and not space.single:
            raise SearchError(
                "refine works on one axis: half-way points of several have no neighbours; use a "
                "finer grid, or trials"
            )
        if trials is not None and trials < 1:
            raise SearchError(f"{trials} trials are none; give at least 1")

    def choosable(self, space: Space) -> list[Point]:
        """Return the points that can be chosen once they and their neighbours are answered.

        Args:
            space: the space.

        Returns:
            Some of its points.
        """
        scores = self.bound(space, space.points)([["?"]] * len(space.points))
        return [p for p, score in zip(space.points, scores, strict=True) if score is not None]

    def ceilings(self, space: Space, points: Sequence[Point]) -> Scores | None:
        """Return the scores of points whose every answer differs from every other point's.

        Args:
            space: the space.
            points: its evaluated points.

        Returns:
            The largest possible score per prompt, per point; None where answers are not compared
            exactly, so that scores near it mean nothing.
        """
        if self.distance.name != EXACT.name:
            return None
        return self.bound(space, points)([[str(number)] for number in range(len(points))])

    def texts(self, answers: Sequence[Sequence[Response]]) -> list[list[str]]:
        """Return what the distance compares.

        Args:
            answers: per point, one response per prompt.

        Returns:
            Per point, one text per prompt.
        """
        if self.follows:
            return [[" ".join(map(str, r.tokens)) for r in at_point] for at_point in answers]
        return [[response.text for response in at_point] for at_point in answers]

    def divides(self, space: Space) -> bool:
        """Return whether distances are divided by the step.

        Args:
            space: the space.

        Returns:
            The choice, or whether the steps differ.
        """
        return not space.evenly_spaced(space.points) if self.per_step is None else self.per_step

    def bound(
        self, space: Space, points: Sequence[Point]
    ) -> Callable[[Sequence[Sequence[str]]], Scores]:
        """Return the criterion for these points, as a function of the texts alone.

        Args:
            space: the space.
            points: its evaluated points.

        Returns:
            Texts per point -> score per point, None where a point cannot be chosen.
        """
        score = get_criterion(self.criterion)
        neighbours = _evaluated(space, points)
        spacing = space.spacing(points) if self.divides(space) else None

        def run(texts: Sequence[Sequence[str]]) -> Scores:
            return score(texts, distance=self.distance, neighbours=neighbours, spacing=spacing)

        return run

    def scores(
        self, space: Space, answers: Mapping[Point, Sequence[Response]]
    ) -> dict[Point, float | None]:
        """Score the evaluated points.

        Args:
            space: the space.
            answers: point -> one response per prompt.

        Returns:
            Point -> score, sorted by point.
        """
        points = sorted(answers)
        texts = self.texts([answers[point] for point in points])
        return dict(zip(points, self.bound(space, points)(texts), strict=True))

    def score_at(
        self, space: Space, answers: Mapping[Point, Sequence[Response]], point: Point
    ) -> float | None:
        """Score one point.

        Args:
            space: the space.
            answers: point -> one response per prompt, of it and its neighbours at least.
            point: the point.

        Returns:
            Its score; None where it cannot be chosen.
        """
        wanted = set(answers)
        if not self.divides(space):  # else the smallest step of all counts
            around = space.neighbours(space.points)[space.points.index(point)]
            near = {space.points[i] for pair in around for i in pair if i is not None}
            wanted &= {point, *near}
        return self.scores(space, {each: answers[each] for each in wanted})[point]


def _evaluated(space: Space, points: Sequence[Point]) -> Neighbours:
    """The neighbours in the space, of which some may not have been evaluated."""
    position = {point: number for number, point in enumerate(points)}
    whole = dict(zip(space.points, space.neighbours(space.points), strict=True))
    return [
        [
            tuple(None if i is None else position.get(space.points[i]) for i in pair)  # type: ignore[misc]
            for pair in whole[point]
        ]
        for point in points
    ]
