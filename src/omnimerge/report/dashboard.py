"""A dashboard as one self-contained HTML page: tables that sort, charts with their numbers."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pydantic import ValidationError

from omnimerge.errors import OmnimergeError, OutputError
from omnimerge.report._page import template
from omnimerge.report.dashboard_charts import (
    COLOURS,
    Chart,
    draw_bars,
    draw_histogram,
    draw_lines,
    draw_radars,
)
from omnimerge.report.dashboard_scales import fixed, significant, with_deviation
from omnimerge.report.dashboard_schema import (
    Bars,
    Cell,
    Column,
    Dashboard,
    Heatmap,
    Histogram,
    Lines,
    Radar,
    Section,
)
from omnimerge.report.plots import WIDTHS
from omnimerge.search.store import write_atomically

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Field:
    """One number of a heat map.

    Attributes:
        text: the number.
        heat: how deep its colour is, from 0 to 1.
        sign: ``below`` for numbers below zero, else empty.
        title: what it is, in words.
    """

    text: str
    heat: float
    sign: str
    title: str


@dataclass(frozen=True)
class Grid:
    """The exact numbers of a chart.

    Attributes:
        heads: of the columns.
        rows: head of the row, and its texts.
    """

    heads: list[str]
    rows: list[tuple[str, list[str]]]


def read_dashboard(source: Path | Mapping[str, Any] | Dashboard) -> Dashboard:
    """Read and check a dashboard.

    Args:
        source: a JSON file, what it would hold, or a dashboard.

    Returns:
        The dashboard.

    Raises:
        OmnimergeError: if it cannot be read or is none; the first problem is named.
    """
    if isinstance(source, Dashboard):
        return source
    where = str(source) if isinstance(source, Path) else "the dashboard"
    try:
        data = json.loads(source.read_text("utf-8")) if isinstance(source, Path) else source
        return Dashboard.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise OutputError(f"{where} is no dashboard: {place}: {message}") from None
    except OSError as error:
        raise OmnimergeError(f"cannot read {where} ({error.strerror})") from error
    except ValueError as error:
        raise OmnimergeError(f"{where} holds no JSON: {error}") from None


def write_dashboard(source: Path | Mapping[str, Any] | Dashboard, file: Path) -> Path:
    """Write a dashboard as one HTML page that asks for nothing from any network.

    Args:
        source: a JSON file, what it would hold, or a dashboard.
        file: the page.

    Returns:
        `file`.

    Raises:
        OmnimergeError: if the source is no dashboard, or the page cannot be written.
    """
    page = render_dashboard(read_dashboard(source))
    # Names may hold half a character, which no file can hold.
    return write_atomically(file, page.encode("utf-8", "backslashreplace").decode("utf-8"))


def render_dashboard(dashboard: Dashboard) -> str:
    """Render a dashboard.

    Args:
        dashboard: what to show.

    Returns:
        HTML.
    """
    names = ("search.css", "dashboard.css", "dashboard.js")
    # Our own files; the rule of the page's contents names the script by its hash.
    common, style, script = ((_TEMPLATES / name).read_text("utf-8") for name in names)
    numbered = list(enumerate(dashboard.sections, 1))
    groups = [
        (name, list(members)) for name, members in groupby(numbered, key=lambda each: each[1].group)
    ]
    return template("dashboard.html", fixed=fixed, significant=significant).render(
        it=dashboard,
        groups=groups,
        style=Markup(common + style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        charts=_charts,
        radars=draw_radars,
        grid=_grid,
        cell=_cell,
        legend=_legend,
        fields=_fields,
        span=_span,
        colours=COLOURS,
    )


def _charts(section: Section) -> dict[str, Chart]:
    """The drawings of a section, one per width of the page."""
    draw = {"bars": draw_bars, "lines": draw_lines, "histogram": draw_histogram}.get(section.kind)
    return {name: draw(section, width) for name, width in WIDTHS.items()} if draw else {}  # type: ignore[operator]


def _legend(section: Section) -> list[tuple[int, str]]:
    """(number, name) of the series, where there is something to tell apart."""
    if isinstance(section, Lines):
        names = [line.name for line in section.lines]
    elif isinstance(section, Radar) and section.apart:
        names = [each.name if each.name in section.references else "" for each in section.series]
    elif isinstance(section, (Bars, Radar, Histogram)):
        names = [each.name for each in section.series]
    else:
        names = []
    found = [(number, name) for number, name in enumerate(names) if name]
    alone = len(found) == 1 and not isinstance(section, (Lines, Radar))
    return [] if alone else found


def _cell(cell: Cell | None, column: Column) -> tuple[str, str]:
    """What a cell of a table shows, and by what it sorts."""
    if cell is None:
        return "", ""
    key = "" if cell.value is None else repr(cell.value)
    if cell.text is not None:
        return cell.text, key
    if column.scientific:
        text = significant(cell.value, column.digits + 1)
        if cell.deviation is not None:
            text += f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{significant(cell.deviation, 2)}"
        return text, key
    return with_deviation(cell.value, cell.deviation, column.digits), key


def _grid(section: Section) -> Grid | None:
    """The exact numbers of a chart, as a table."""
    if isinstance(section, Bars):
        heads, names = [section.head, *(s.name for s in section.series)], section.categories
        return Grid(heads, _columns(names, section.series, section.digits))
    if isinstance(section, Radar):
        heads = ["", *section.axes]
        return Grid(
            heads,
            [(s.name, [fixed(v, section.digits) for v in s.values]) for s in section.series],
        )
    if isinstance(section, Lines):
        return _lines_grid(section)
    if isinstance(section, Histogram):
        bins = [
            f"{significant(low, 3)} to {significant(high, 3)}"
            for low, high in zip(section.edges, section.edges[1:], strict=False)
        ]
        rows = [
            (name, [significant(s.values[i], section.digits) for s in section.series])
            for i, name in enumerate(bins)
        ]
        return Grid([section.x, *(s.name for s in section.series)], rows)
    return None


def _columns(names: Sequence[str], series: Sequence[Any], digits: int) -> Any:
    return [
        (
            name,
            [
                with_deviation(s.values[i], s.deviations[i] if s.deviations else None, digits)
                for s in series
            ],
        )
        for i, name in enumerate(names)
    ]


def _lines_grid(section: Lines) -> Grid:
    places = sorted({x for line in section.lines for x in line.x})
    known = [dict(zip(line.x, range(len(line.x)), strict=True)) for line in section.lines]
    rows = []
    for x in places:
        texts = []
        for line, at in zip(section.lines, known, strict=True):
            i = at.get(x)
            text = significant(None if i is None else line.y[i], section.digits)
            if i is not None and line.low and line.low[i] is not None:
                ends = (significant(band[i], section.digits) for band in (line.low, line.high))
                text += f" ({' to '.join(ends)})"
            texts.append(text)
        rows.append((significant(x), texts))
    return Grid([section.x, *(line.name for line in section.lines)], rows)


def _span(section: Heatmap) -> tuple[float, float]:
    """The values of the palest and the deepest colour."""
    known = [v for row in section.values for v in row if v is not None] or [0.0]
    low = min(0.0, *known) if section.low is None else section.low
    high = max(known) if section.high is None else section.high
    return low, high if high > low else low + 1.0


def _fields(section: Heatmap) -> list[tuple[str, list[Field | None]]]:
    """The rows of a heat map. Where values lie on both sides of zero, zero has no colour."""
    low, high = _span(section)
    both = low < 0 < high
    reach = max(-low, high) if both else high - low

    def made(value: float | None, row: str, column: str) -> Field | None:
        if value is None:
            return None
        heat = abs(value) / reach if both else (value - low) / reach
        text = fixed(value, section.digits)
        sign = "below" if both and value < 0 else ""
        return Field(text, min(1.0, max(0.0, heat)), sign, f"{row}, {column}: {text}")

    return [
        (row, [made(v, row, column) for column, v in zip(section.columns, values, strict=True)])
        for row, values in zip(section.rows, section.values, strict=True)
    ]
