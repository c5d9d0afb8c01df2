"""The coefficients that a search tries: axes, their points, and which points are neighbours."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omnimerge.errors import SearchError
from omnimerge.search.grid import parse_grid, point_name
from omnimerge.search.result import label

Point = tuple[float, ...]
"""One value per axis."""
Neighbours = list[list[tuple[int | None, int | None]]]
"""Per point, per axis: position of the previous and of the next point."""

_MATCH_KEYS = ("layers", "slot", "name", "component")
_MOST_POINTS = 2000
_LONG_NAME, _LONG_FILE_NAME = 40, 180  # characters; file systems take 255 bytes


@dataclass(frozen=True, slots=True)
class Axis:
    """One number that is searched.

    Attributes:
        keyword: the method's keyword.
        values: where it is tried, increasing.
        match: for which tensors, in the words of a recipe's `overrides`; empty for all.
        donor: position of the donor whose share it is, where several donors' shares are searched.
    """

    keyword: str
    values: tuple[float, ...]
    match: Mapping[str, str] = field(default_factory=dict)
    donor: int | None = None

    @property
    def name(self) -> str:
        """What it is called in results: ``alpha``, ``alpha@layers:0-13``, ``alpha.2``."""
        if self.donor is not None:
            return f"{self.keyword}.{self.donor + 1}"
        told = ",".join(f"{key}:{value}" for key, value in self.match.items())
        return f"{self.keyword}@{told}" if told else self.keyword


@dataclass(frozen=True)
class Entry:
    """An override that a point puts before those of the recipe.

    Attributes:
        match: for which tensors.
        axes: positions of the axes whose values it sets.
        parameters: what it sets besides.
        keep: whether it keeps the target's tensors, and sets nothing.
    """

    match: Mapping[str, str]
    axes: tuple[int, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    keep: bool = False


@dataclass(frozen=True)
class Space:
    """All points of a search.

    Attributes:
        axes: what is searched.
        points: the points, in the order in which they are evaluated.
        text: the space as it was asked for.
        entries: the overrides of a point, where axes meet on some tensors, or meet the recipe's
            own overrides; None where each axis stands for itself.
    """

    axes: tuple[Axis, ...]
    points: tuple[Point, ...]
    text: str
    entries: tuple[Entry, ...] | None = None

    @classmethod
    def of(cls, texts: Sequence[str], default: str = "alpha") -> Space:
        """Parse axes.

        Args:
            texts: one per axis: a grid (``0:0.6:0.1``, for the keyword `default`),
                ``keyword=GRID``, or ``keyword@layers:0-13=GRID`` for the tensors that a recipe's
                override would match (``layers``, ``slot``, ``name``, ``component``).
            default: the keyword of a text that is a grid alone.

        Returns:
            The product of the axes.

        Raises:
            SearchError: if a text is no axis, an axis is given twice, or there are too many points.
        """
        axes = tuple(_parse_axis(text, default) for text in texts)
        names = [axis.name for axis in axes]
        if len(set(names)) < len(names):
            raise SearchError(f"an axis is given twice: {', '.join(names)}")
        count = 1
        for axis in axes:
            count *= len(axis.values)
        if count > _MOST_POINTS:
            raise SearchError(
                f"{count:,} points are more than {_MOST_POINTS:,}; use coarser grids, or let "
                "--trials N try some of them"
            )
        points = tuple(itertools.product(*(axis.values for axis in axes)))
        return cls(axes, points, " ".join(texts))

    @classmethod
    def simplex(cls, text: str, donors: int) -> Space:
        """Make the lattice of the shares of several donors, θ = (1 - Σ αᵢ) target + Σ αᵢ donorᵢ.

        Args:
            text: a grid from 0, such as ``0:0.6:0.1``: the values of each share; their sum goes no
                further than the last.
            donors: how many donors there are.

        Returns:
            The points whose shares sum to at most the grid's end.

        Raises:
            SearchError: if the grid does not start at 0, or there are too many points.
        """
        values = parse_grid(text)
        if values[0] != 0:
            raise SearchError(f"shares {text!r} do not start at 0; write for example 0:0.6:0.1")
        axes = tuple(Axis("alpha", values, donor=number) for number in range(donors))
        points = tuple(
            point
            for point in itertools.product(values, repeat=donors)
            if sum(point) <= values[-1] + 1e-9
        )
        if len(points) > _MOST_POINTS:
            raise SearchError(f"{len(points):,} points are more than {_MOST_POINTS:,}")
        return cls(axes, points, f"shares {text}")

    @property
    def defaults(self) -> dict[str, float]:
        """Values for a recipe that has none of what is searched for all tensors."""
        return {axis.keyword: axis.values[0] for axis in self.axes if not axis.match}

    @property
    def single(self) -> bool:
        """Whether there is one axis."""
        return len(self.axes) == 1

    def with_points(self, points: Sequence[Point]) -> Space:
        """Return the space with more points.

        Args:
            points: further points.

        Returns:
            The space with all of them, sorted.
        """
        return replace(self, points=tuple(sorted({*self.points, *points})))

    def values(self, point: Point) -> dict[str, float]:
        """Return a point by the names of the axes.

        Args:
            point: one of the points.

        Returns:
            Axis name -> value.
        """
        return {axis.name: value for axis, value in zip(self.axes, point, strict=True)}

    def label(self, point: Point) -> str:
        """Return a point for people: ``0.3``, or ``alpha 0.3, density 0.5``.

        Args:
            point: one of the points.

        Returns:
            The text.
        """
        return label(self.values(point))

    def file_name(self, point: Point) -> str:
        """Return a point as a part of a file's name: ``alpha_0.30``.

        Args:
            point: one of the points.

        Returns:
            Text that tells any two points apart.
        """
        values = self.values(point).items()
        parts = [f"{_plain(name, _LONG_NAME)}_{point_name(value)}" for name, value in values]
        return _plain(",".join(parts), _LONG_FILE_NAME)

    def settings(self, point: Point) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return what a point changes in a recipe.

        Args:
            point: one of the points.

        Returns:
            (keywords of the method, overrides to put before the recipe's own).
        """
        parameters: dict[str, Any] = {}
        shares = []
        for axis, value in zip(self.axes, point, strict=True):
            if axis.donor is not None:
                shares.append(value)
            elif not axis.match:
                parameters[axis.keyword] = value
        if shares:
            total = round(sum(shares), 12)
            parameters["alpha"] = total
            parameters["weights"] = shares if total else [1.0] * len(shares)
        return parameters, [self._override(entry, point) for entry in self._entries()]

    def _entries(self) -> tuple[Entry, ...]:
        if self.entries is not None:
            return self.entries
        return tuple(Entry(dict(match), axes) for match, axes in self.matches().items())

    def _override(self, entry: Entry, point: Point) -> dict[str, Any]:
        if entry.keep:
            return {"match": dict(entry.match), "keep": "target"}
        searched = {self.axes[number].keyword: point[number] for number in entry.axes}
        return {"match": dict(entry.match), "parameters": {**entry.parameters, **searched}}

    def matches(self) -> dict[tuple[tuple[str, str], ...], tuple[int, ...]]:
        """Return what axes are for, where they are not for all tensors.

        Returns:
            The items of a match -> positions of its axes.
        """
        found: dict[tuple[tuple[str, str], ...], tuple[int, ...]] = {}
        for number, axis in enumerate(self.axes):
            if axis.match:
                key = tuple(axis.match.items())
                found[key] = (*found.get(key, ()), number)
        return found

    def neighbours(self, points: Sequence[Point]) -> Neighbours:
        """Find each point's neighbours: the nearest along one axis, all other values equal.

        Args:
            points: evaluated points.

        Returns:
            Per point, per axis, the positions of the previous and the next point, or None.
        """
        found: Neighbours = [[(None, None)] * len(self.axes) for _ in points]
        for number in range(len(self.axes)):
            lines: dict[Point, list[tuple[float, int]]] = {}
            for position, point in enumerate(points):
                others = point[:number] + point[number + 1 :]
                lines.setdefault(others, []).append((point[number], position))
            for line in lines.values():
                ordered = [position for _, position in sorted(line)]
                for before, here, after in zip(
                    [None, *ordered], ordered, [*ordered[1:], None], strict=False
                ):
                    found[here][number] = (before, after)
        return found

    def spacing(self, points: Sequence[Point]) -> list[list[tuple[float, float]]]:
        """Return the distances to each point's neighbours.

        Args:
            points: evaluated points.

        Returns:
            Per point, per axis, the step from the previous point and to the next; 0 where there is
            none.
        """
        return [
            [
                (
                    point[axis] - points[before][axis] if before is not None else 0.0,
                    points[after][axis] - point[axis] if after is not None else 0.0,
                )
                for axis, (before, after) in enumerate(around)
            ]
            for point, around in zip(points, self.neighbours(points), strict=True)
        ]

    def evenly_spaced(self, points: Sequence[Point]) -> bool:
        """Return whether all neighbours of an axis are equally far apart.

        Args:
            points: evaluated points.

        Returns:
            False for example after refinement.
        """
        steps: list[set[float]] = [set() for _ in self.axes]
        for around in self.spacing(points):
            for axis, pair in enumerate(around):
                steps[axis] |= {round(step, 9) for step in pair if step}
        return all(len(found) <= 1 for found in steps)

    def between(self, points: Sequence[Point], chosen: Point) -> list[Point]:
        """Return the points half-way to the chosen point's neighbours, for refinement.

        Args:
            points: evaluated points.
            chosen: the best of them.

        Returns:
            New points, along each axis.
        """
        found = []
        around = self.neighbours(points)[list(points).index(chosen)]
        for axis, pair in enumerate(around):
            for other in pair:
                if other is not None:
                    middle = round((chosen[axis] + points[other][axis]) / 2, 12)
                    found.append((*chosen[:axis], middle, *chosen[axis + 1 :]))
        return found


def _plain(text: str, most: int) -> str:
    """Text for the name of a file; a hash of what it was tells any two apart."""
    plain = re.sub(r"[^\w.@,=+-]", "_", text, flags=re.ASCII)[:most]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _parse_axis(text: str, default: str) -> Axis:
    left, equals, grid = text.rpartition("=")
    if not equals:
        return Axis(default, parse_grid(text))
    keyword, at, where = left.partition("@")
    if not re.fullmatch(r"[A-Za-z_]\w*", keyword):
        raise SearchError(
            f"axis {text!r}: {keyword!r} is no keyword; write for example density=0.2:0.8:0.2"
        )
    match = {}
    if at:
        key, colon, value = where.partition(":")
        if key not in _MATCH_KEYS or not colon or not value:
            raise SearchError(
                f"axis {text!r}: write {keyword}@KEY:VALUE=GRID with KEY one of "
                f"{', '.join(_MATCH_KEYS)}, for example alpha@layers:0-13=0:0.6:0.2"
            )
        match = {key: value}
    return Axis(keyword, parse_grid(grid), match)
