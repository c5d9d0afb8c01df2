"""The geometry of a dashboard's charts; a template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from omnimerge.report.dashboard_scales import (
    Scale,
    fixed,
    linear,
    log_ticks,
    logarithmic,
    significant,
    thinned,
    with_deviation,
    with_zero,
)
from omnimerge.report.dashboard_schema import Bars, Histogram, Line, Lines, Radar, Series
from omnimerge.report.plots import nice_ticks

COLOURS = 8  # series beyond them get the same colours, dashed
_LEFT, _RIGHT, _TOP, _BOTTOM, _INSET = 58.0, 18.0, 14.0, 46.0, 10.0
_HEIGHT = 250.0
_LETTER = 7.0  # pixels that a letter of a label takes at most, on average
_ZERO_ROOM = 40.0
_BAR, _BAR_GAP, _GROUP_GAP, _LABEL_LINE = 15.0, 3.0, 12.0, 19.0
_RADAR = {True: (70.0, 6.0), False: (122.0, 7.2)}  # radius, pixels a letter takes


@dataclass(frozen=True)
class Mark:
    """A dot, or a bar with its whisker.

    Attributes:
        x: left end of a bar, middle of a dot.
        y: upper end of a bar, middle of a dot.
        title: what it is, in words.
        width: of a bar.
        height: of a bar.
        whisker: (left, right) of ± its deviation.
        text: its value.
        text_x: where the value is written.
    """

    x: float
    y: float
    title: str
    width: float = 0.0
    height: float = 0.0
    whisker: tuple[float, float] | None = None
    text: str = ""
    text_x: float = 0.0


@dataclass
class Stroke:
    """What one series looks like.

    Attributes:
        name: of the series.
        number: of the series, from 0.
        lines: polylines, as SVG ``points`` attributes.
        areas: polygons, as SVG ``points`` attributes.
        marks: its dots or bars.
        emphasis: whether it stands out.
        reference: whether it is only there to compare with.
        first: whether it is the first of its chart.
    """

    name: str
    number: int
    lines: list[str] = field(default_factory=list)
    areas: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    emphasis: bool = False
    reference: bool = False
    first: bool = False


@dataclass
class Chart:
    """A drawing.

    Attributes:
        width: of it.
        height: of it.
        left: left edge of the plot.
        right: its right edge.
        top: its upper edge.
        bottom: its lower edge.
        x_ticks: (x, text).
        y_ticks: (y, text).
        levels: (y, name) of horizontal lines.
        labels: (x, y, text, anchor, whether it stands out).
        rings: polygons of a radar's grid.
        spokes: (x, y) of the ends of a radar's axes; they start in `middle`.
        middle: of a radar.
        strokes: one per series.
        name: of a chart of one series.
    """

    width: float
    height: float
    left: float = 0.0
    right: float = 0.0
    top: float = 0.0
    bottom: float = 0.0
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    levels: list[tuple[float, str]] = field(default_factory=list)
    labels: list[tuple[float, float, str, str, bool]] = field(default_factory=list)
    rings: list[str] = field(default_factory=list)
    spokes: list[tuple[float, float]] = field(default_factory=list)
    middle: tuple[float, float] = (0.0, 0.0)
    strokes: list[Stroke] = field(default_factory=list)
    name: str = ""


def draw_bars(section: Bars, width: float) -> Chart:
    """Draw horizontal bars; on a narrow page labels are above them instead of beside.

    Args:
        section: what to draw.
        width: of the drawing, in pixels.

    Returns:
        Where everything is.
    """
    longest = _LETTER * max(len(name) for name in section.categories) + 12
    above = longest > 0.36 * width
    values = _written(section)
    room = _LETTER * max((len(text) for row in values for text in row), default=0) + 10
    left = 8.0 if above else longest
    right = width - room - 4
    lows, highs = _reach(section.series)
    ticks = nice_ticks(min(0.0, *lows), max(0.0, *highs), 4 if width < 500 else 6)
    place = linear(ticks[0], ticks[-1], left, right)
    chart = Chart(width, 0.0, left, right, top=4.0)
    chart.strokes = [
        Stroke(each.name, number, emphasis=each.emphasis)
        for number, each in enumerate(section.series)
    ]
    y = chart.top + 4
    for row, category in enumerate(section.categories):
        strong = category in section.emphasis
        tall = len(section.series) * (_BAR + _BAR_GAP) - _BAR_GAP
        if above:
            chart.labels.append((left, y + 8, category, "start", strong))
            y += _LABEL_LINE
        else:
            chart.labels.append((left - 10, y + tall / 2, category, "end", strong))
        for stroke, each in zip(chart.strokes, section.series, strict=True):
            if (value := each.values[row]) is not None:
                spread = (each.deviations[row] if each.deviations else None) or 0.0
                ends = (place(value - spread), place(value + spread)) if spread else None
                start, stop = sorted((place(0.0), place(value)))
                text = values[row][stroke.number]
                after = max(stop, *(ends or ())) + 6 if ends else stop + 6
                title = f"{category}, {each.name}: {text}"
                stroke.marks.append(
                    Mark(start, y, title, max(stop - start, 0.5), _BAR, ends, text, after)
                )
            y += _BAR + _BAR_GAP
        y += _GROUP_GAP - _BAR_GAP
    chart.bottom = y - _GROUP_GAP + 6
    chart.height = chart.bottom + 44
    chart.x_ticks = thinned([(place(tick), significant(tick)) for tick in ticks])
    return chart


def draw_lines(section: Lines, width: float) -> Chart:
    """Draw curves.

    Args:
        section: what to draw.
        width: of the drawing, in pixels.

    Returns:
        Where everything is.
    """
    values = [v for line in section.lines for v in (*line.y, *line.low, *line.high)]
    known = [v for v in (*values, *section.levels.values()) if v is not None]
    chart, y_place = _frame(known or [0.0], section.log_y, width)
    xs = sorted({x for line in section.lines for x in line.x})
    x_place = _x_axis(chart, xs, section.log_x, marked=len(xs) <= 12)
    for number, line in enumerate(section.lines):
        stroke = Stroke(line.name, number, emphasis=line.emphasis)
        for run in _runs(line):
            points = [(x_place(line.x[i]), y_place(line.y[i] or 0.0)) for i in run]
            stroke.lines.append(_points(points))
            if line.low:
                stroke.areas.append(_band(line, run, x_place, y_place))
        stroke.marks = [
            Mark(x_place(x), y_place(y), _title(line, i, section))
            for i, (x, y) in enumerate(zip(line.x, line.y, strict=True))
            if y is not None
        ]
        chart.strokes.append(stroke)
    chart.levels = [(y_place(value), name) for name, value in section.levels.items()]
    return chart


def draw_histogram(section: Histogram, width: float) -> Chart:
    """Draw distributions as steps.

    Args:
        section: what to draw.
        width: of the drawing, in pixels.

    Returns:
        Where everything is.
    """
    known = [v for each in section.series for v in each.values if v is not None]
    chart, y_place = _frame([0.0, *known], False, width)
    x_place = _x_axis(chart, section.edges, section.log_x, marked=False)
    for number, each in enumerate(section.series):
        stroke = Stroke(each.name, number, emphasis=each.emphasis)
        points = [(x_place(section.edges[0]), chart.bottom)]
        for (low, high), value in zip(pairwise(section.edges), each.values, strict=True):
            height = y_place(value or 0.0)
            points += [(x_place(low), height), (x_place(high), height)]
        points.append((x_place(section.edges[-1]), chart.bottom))
        stroke.lines, stroke.areas = [_points(points)], [_points(points)]
        chart.strokes.append(stroke)
    return chart


def draw_radars(section: Radar) -> list[Chart]:
    """Draw polygons: all in one radar, or each in one of its own beside the references.

    Args:
        section: what to draw.

    Returns:
        The radars.
    """
    if not section.apart:
        return [_radar(section, list(enumerate(section.series)), "")]
    references = [(n, s) for n, s in enumerate(section.series) if s.name in section.references]
    return [
        _radar(section, [*references, (number, each)], each.name)
        for number, each in enumerate(section.series)
        if each.name not in section.references
    ]


def _radar(section: Radar, chosen: Sequence[tuple[int, Series]], name: str) -> Chart:
    radius, letter = _RADAR[section.apart]
    away = radius + (11 if section.apart else 15)
    width = 2 * (radius + 14 + letter * max(map(len, section.axes)))
    x, y = width / 2, away + 10
    lowest = max(-math.cos(2 * math.pi * i / len(section.axes)) for i in range(len(section.axes)))
    height = y + away * lowest + 10
    angles = [2 * math.pi * i / len(section.axes) for i in range(len(section.axes))]

    def at(angle: float, share: float) -> tuple[float, float]:
        length = radius * min(1.0, max(0.0, share))
        return x + length * math.sin(angle), y - length * math.cos(angle)

    def share(value: float) -> float:
        return (value - section.low) / (section.high - section.low)

    chart = Chart(width, height, middle=(x, y), name=name)
    chart.spokes = [at(angle, 1.0) for angle in angles]
    chart.rings = [_points([at(a, s) for a in angles]) for s in (0.25, 0.5, 0.75, 1.0)]
    for angle, axis in zip(angles, section.axes, strict=True):
        sine = math.sin(angle)
        anchor = "middle" if abs(sine) < 0.2 else "start" if sine > 0 else "end"
        chart.labels.append(
            (x + away * sine, y - away * math.cos(angle), axis, anchor, False)
        )  # fmt: skip
    for number, each in chosen:
        stroke = Stroke(each.name, number, emphasis=each.emphasis)
        stroke.reference = section.apart and each.name in section.references
        stroke.first = not chart.strokes
        points = [at(a, share(v or section.low)) for a, v in zip(angles, each.values, strict=True)]
        if None in each.values:  # no area where a side is missing
            known = [p for p, v in zip(points, each.values, strict=True) if v is not None]
            stroke.lines = [_points(known)]
        else:
            stroke.areas = [_points(points)]
        stroke.marks = [
            Mark(px, py, f"{each.name}, {axis}: {fixed(value, section.digits, section.unit)}")
            for (px, py), axis, value in zip(points, section.axes, each.values, strict=True)
            if value is not None
        ]
        chart.strokes.append(stroke)
    return chart


def _frame(values: Sequence[float], as_log: bool, width: float) -> tuple[Chart, Scale]:
    """A chart with its vertical axis."""
    chart = Chart(width, _TOP + _HEIGHT + _BOTTOM, _LEFT, width - _RIGHT, _TOP, _TOP + _HEIGHT)
    low, high = min(values), max(values)
    if as_log:
        ticks = log_ticks(low, high, 6)
        low, high = min(low, ticks[0]), max(high, ticks[-1])
        place = logarithmic(low, high if high > low else low * 10, chart.bottom, chart.top)
    else:
        ticks = nice_ticks(low, high, 5)
        place = linear(ticks[0], ticks[-1], chart.bottom, chart.top)
    chart.y_ticks = [(place(tick), significant(tick)) for tick in ticks]
    return chart, place


def _x_axis(chart: Chart, xs: Sequence[float], as_log: bool, *, marked: bool) -> Scale:
    """Give a chart its horizontal axis, with a tick at each place or at round numbers."""
    left, right = chart.left + _INSET, chart.right - _INSET
    low, high = min(xs), max(xs)
    if as_log and high > 0:
        start = min(x for x in xs if x > 0)
        # Zero has no place on such an axis: it gets one before its start.
        first = left + (_ZERO_ROOM if low == 0 else 0.0)
        above = logarithmic(start, high if high > start else 10 * start, first, right)
        place = with_zero(above, left)
        ticks = [tick for tick in log_ticks(start, high, 8) if low <= tick <= high * (1 + 1e-9)]
    else:
        place = linear(low, high if high > low else low + 1, left, right)
        ticks = [tick for tick in nice_ticks(low, high, 8) if low - 1e-12 <= tick <= high + 1e-12]
    ticks = list(xs) if marked else ticks
    chart.x_ticks = thinned([(place(tick), significant(tick)) for tick in ticks])
    return place


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _runs(line: Line) -> list[list[int]]:
    """Places of a curve without gaps between them."""
    runs: list[list[int]] = [[]]
    for i, value in enumerate(line.y):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(i)
    return [run for run in runs if run]


def _band(
    line: Line,
    run: Sequence[int],
    x_place: Scale,
    y_place: Scale,
) -> str:
    def edge(values: Sequence[float | None], i: int) -> tuple[float, float]:
        value = values[i]
        return x_place(line.x[i]), y_place((line.y[i] or 0.0) if value is None else value)

    return _points([edge(line.high, i) for i in run] + [edge(line.low, i) for i in reversed(run)])


def _title(line: Line, i: int, section: Lines) -> str:
    low, high = (band[i] if band else None for band in (line.low, line.high))
    span = ""
    if low is not None and high is not None:
        span = f" ({significant(low, section.digits)} to {significant(high, section.digits)})"
    value = significant(line.y[i], section.digits)
    return f"{line.name}, {section.x} {significant(line.x[i])}: {value}{span}"


def _reach(series: Sequence[Series]) -> tuple[list[float], list[float]]:
    """The ends of all bars and whiskers."""
    lows, highs = [0.0], [0.0]
    for each in series:
        for value, spread in zip(
            each.values, each.deviations or (None,) * len(each.values), strict=True
        ):
            if value is not None:
                lows.append(value - (spread or 0.0))
                highs.append(value + (spread or 0.0))
    return lows, highs


def _written(section: Bars) -> list[list[str]]:
    """The values as text: category, series."""
    return [
        [
            with_deviation(
                each.values[row],
                each.deviations[row] if each.deviations else None,
                section.digits,
                section.unit,
            )
            for each in section.series
        ]
        for row in range(len(section.categories))
    ]
