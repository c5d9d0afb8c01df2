"""A criterion with its distance, applied to the points of a space."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omnimerge.errors import SearchError
from omnimerge.search.criteria import get_criterion
from omnimerge.search.distances import Distance, get_distance
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
        scores = self.bound(space, space.points)([["?"]] * len(space.points))
        if all(score is None for score in scores):
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

    def divides(self, space: Space, points: Sequence[Point]) -> bool:
        """Return whether distances are divided by the step.

        Args:
            space: the space.
            points: its evaluated points.

        Returns:
            The choice, or whether the steps differ.
        """
        return not space.evenly_spaced(points) if self.per_step is None else self.per_step

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
        spacing = space.spacing(points) if self.divides(space, points) else None

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
