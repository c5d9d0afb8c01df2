"""The geometry of a search's charts; a template draws them, and a browser writes their text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from omnimerge.search import SearchResult

WIDTHS = {"wide": 960.0, "middle": 620.0, "narrow": 336.0}  # the style sheet shows one of them
_LEFT, _RIGHT, _TOP, _GAP, _BOTTOM, _INSET = 44.0, 18.0, 26.0, 44.0, 44.0, 14.0
_HEIGHTS = {"score": 190.0, "accuracy": 130.0}
_HEADROOM = 24.0  # for the number above the highest dot
_NUMBER_ROOM, _TICK_ROOM = 30.0, 34.0  # pixels that a number takes of the width


@dataclass(frozen=True)
class Dot:
    """One point of a curve.

    Attributes:
        x: its place.
        y: its place.
        text: its value, or nothing where there is no room.
        title: what it is, in words.
        kind: what it looks like.
    """

    x: float
    y: float
    text: str
    title: str
    kind: Literal["plain", "tied", "chosen", "unscored"]


@dataclass
class Panel:
    """One curve.

    Attributes:
        name: ``score`` or ``accuracy``.
        top: its upper edge.
        bottom: its lower edge.
        ticks: (y, text).
        lines: runs of dots to be joined, as an SVG ``points`` attribute.
        dots: its points.
        noise: y of the noise floor, if it has one.
    """

    name: str
    top: float
    bottom: float
    ticks: list[tuple[float, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    noise: float | None = None


@dataclass
class Curve:
    """The criterion over one coefficient and, below it, the accuracy where it is known.

    Attributes:
        width: of the drawing.
        height: of the drawing.
        left: left edge of the panels.
        right: their right edge.
        chosen: x of the chosen point.
        band: (x, width) of the bootstrap interval, if there is one.
        ticks: (x, text).
        panels: the curves.
    """

    width: float
    height: float
    left: float
    right: float
    chosen: float
    band: tuple[float, float] | None
    ticks: list[tuple[float, str]]
    panels: list[Panel]


@dataclass(frozen=True)
class Field:
    """One point of a heat map.

    Attributes:
        text: its value.
        heat: from 0, the worst, to 1, the best.
        title: what it is, in words.
        kind: ``plain``, ``tied``, ``chosen`` or ``unscored``.
    """

    text: str
    heat: float
    title: str
    kind: str


@dataclass(frozen=True)
class HeatMap:
    """A number over two coefficients.

    Attributes:
        name: ``score`` or ``accuracy``.
        down: name of the axis that goes down.
        across: name of the axis that goes to the right.
        heads: values of the axis that goes to the right.
        rows: (value of the axis that goes down, a field per column, None where nothing was tried).
    """

    name: str
    down: str
    across: str
    heads: list[str]
    rows: list[tuple[str, list[Field | None]]]


def draw_curve(result: SearchResult, width: float) -> Curve:
    """Draw a search over one coefficient.

    Args:
        result: what it found.
        width: of the drawing, in pixels; text keeps its size.

    Returns:
        Where everything is.
    """
    xs = [point.alpha for point in result.points]
    left, right = _LEFT, width - _RIGHT
    low, span = min(xs), max(xs) - min(xs) or 1.0

    def place(x: float) -> float:
        return left + _INSET + (x - low) / span * (right - left - 2 * _INSET)

    places = [place(x) for x in xs]
    gap = min((b - a for a, b in pairwise(places)), default=width)
    panels, top = [], _TOP
    for name, height in _HEIGHTS.items():
        if name == "score" or _labelled(result):
            panels.append(_panel(result, name, top, top + height, places, gap >= _NUMBER_ROOM))
            top += height + _GAP
    band = None
    bootstrap = result.diagnostics.bootstrap
    if bootstrap and result.axes[0].name in bootstrap.interval:
        first, last = map(place, bootstrap.interval[result.axes[0].name])
        wider = min(0.25 * gap, 12.0)  # an interval of one point is seen, too
        band = first - wider, last - first + 2 * wider
    height = top - _GAP + _BOTTOM
    ticks = _thinned(list(zip(places, (f"{x:g}" for x in xs), strict=True)), _TICK_ROOM)
    return Curve(width, height, left, right, place(result.alpha), band, ticks, panels)


def heat_map(result: SearchResult, name: str) -> HeatMap:
    """Lay a search over two coefficients out as a table; the longer axis goes down.

    Args:
        result: what it found.
        name: ``score`` or ``accuracy``.

    Returns:
        The table.
    """
    across, down = sorted(result.axes, key=lambda axis: len(axis.grid))
    known = [value for value in _values(result, name) if value is not None]
    low, high = min(known), max(known)
    fields = {}
    for point, value in zip(result.points, _values(result, name), strict=True):
        heat = 0.0 if value is None or high == low else (value - low) / (high - low)
        heat = 1 - heat if name == "score" and value is not None else heat
        text = "–" if value is None else _written(value, name)
        kind = _kind(result, point.values, value, name)
        title = f"{point.label}: {text}" + (", chosen" if kind == "chosen" else "")
        fields[point.values[down.name], point.values[across.name]] = Field(text, heat, title, kind)
    return HeatMap(
        name,
        down.name,
        across.name,
        [f"{x:g}" for x in across.grid],
        [(f"{y:g}", [fields.get((y, x)) for x in across.grid]) for y in down.grid],
    )


def noise_line(result: SearchResult) -> int | None:
    """Return the noise floor, where it can be drawn among the scores.

    Args:
        result: what a search found.

    Returns:
        How many answers differ by chance; None where scores do not count answers.
    """
    noise = result.diagnostics.noise
    return noise.differing if noise and result.distance == "exact" else None


def nice_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Return round numbers for an axis.

    Args:
        low: the smallest value.
        high: the largest value.
        most: how many steps at most.

    Returns:
        Multiples of 1, 2 or 5 times a power of ten that enclose both, increasing; where both are
        equal, zero too.
    """
    if high <= low:
        low, high = min(low, 0.0), max(low, 0.0) or 1.0
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = (size * factor for factor in (1, 2, 5, 10, 20))
    for step in steps:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [round(step * i, 12) for i in range(first, last + 1)]


def _panel(
    result: SearchResult,
    name: str,
    top: float,
    bottom: float,
    places: Sequence[float],
    numbered: bool,
) -> Panel:
    values = _values(result, name)
    known = [value for value in values if value is not None]
    noise = noise_line(result) if name == "score" else None
    low = 0.0 if name == "score" else min(known)
    ticks = nice_ticks(low, max([*known, noise or 0.0]))
    floor, ceiling = ticks[0], ticks[-1]

    def place(value: float) -> float:
        share = (value - floor) / (ceiling - floor)
        return bottom - share * (bottom - top - _HEADROOM)

    panel = Panel(name, top, bottom, [(place(tick), _tick(tick, name)) for tick in ticks])
    panel.noise = None if noise is None else place(noise)
    runs: list[list[str]] = [[]]
    for x, value, point in zip(places, values, result.points, strict=True):
        where = f"{result.axes[0].name} {point.label}"
        if value is None:
            runs.append([])
            if name == "score":
                panel.dots.append(Dot(x, bottom, "", f"{where}: not scored", "unscored"))
            continue
        runs[-1].append(f"{x:.1f},{place(value):.1f}")
        kind, text = _kind(result, point.values, value, name), _written(value, name)
        panel.dots.append(Dot(x, place(value), text if numbered else "", f"{where}: {text}", kind))
    panel.lines = [" ".join(run) for run in runs if run]
    return panel


def _labelled(result: SearchResult) -> bool:
    return any(point.accuracy is not None for point in result.points)


def _values(result: SearchResult, name: str) -> list[float | None]:
    if name == "score":
        return [point.score for point in result.points]
    return [point.accuracy for point in result.points]


def _kind(
    result: SearchResult, values: dict[str, float], value: float | None, name: str
) -> Literal["plain", "tied", "chosen", "unscored"]:
    if values == result.selected:
        return "chosen"
    if value is None:
        return "unscored"
    return "tied" if name == "score" and values in result.tie_set else "plain"


def _written(value: float, name: str) -> str:
    return f"{value:.4g}" if name == "score" else f"{100 * value:.1f}"


def _tick(value: float, name: str) -> str:
    return f"{value:g}" if name == "score" else f"{100 * value:g} %"


def _thinned(ticks: list[tuple[float, str]], room: float) -> list[tuple[float, str]]:
    """The ticks whose texts do not run into the one before."""
    kept: list[tuple[float, str]] = []
    for x, text in ticks:
        if not kept or x - kept[-1][0] >= room:
            kept.append((x, text))
    return kept
