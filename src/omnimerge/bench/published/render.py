"""A published table as text, Markdown or JSON, with its footnotes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from omnimerge.bench.published.compare import Comparison
from omnimerge.bench.published.recompute import recompute
from omnimerge.bench.published.schema import Column, Note, Table, Value
from omnimerge.bench.published.tables import catalogue

WIDTH = 100
"""Where sentences are broken; tables may be wider."""

Grid = list[list[str]]


def source(table: Table) -> str:
    """Say where a table comes from.

    Args:
        table: the table.

    Returns:
        One line.
    """
    paper = catalogue().papers[table.paper]
    if table.paper == "all":
        return f"{paper.title}: {table.where}"
    told = f"{table.where} of {paper.authors} “{paper.title}.” {paper.venue}. {paper.url}"
    return f"{told}; read from {table.read_from}" if table.read_from else told


def text(table: Table, comparison: Comparison | None = None) -> str:
    """Draw a table for a terminal.

    Args:
        table: the table.
        comparison: a user's results to draw in its place, beside the printed ones.

    Returns:
        Title, source, table and footnotes.
    """
    head = [table.title, *textwrap.wrap(f"Source: {source(table)}", WIDTH)]
    if table.about:
        head += textwrap.wrap(table.about, WIDTH)
    wordy = all(column.kind == "text" for column in table.columns)
    body = _records(table) if wordy else _align(_grid(table, comparison))
    foot = [line for mark, note in _shown(table, body) for line in _note(mark, note)]
    return "\n".join([*head, "", *body, "", *foot, *_left_out(comparison)]).rstrip()


def markdown(table: Table, comparison: Comparison | None = None) -> str:
    """Draw a table in Markdown.

    Args:
        table: the table.
        comparison: as in `text`.

    Returns:
        Title, source, table and footnotes.
    """
    header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in _grid(table, comparison)]
    numbers = ["---" if column.kind == "text" else "---:" for column in table.columns]
    rule = [*(["---"] * (len(header) - len(numbers))), *numbers]
    lines = [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]
    foot = [f"{mark + ' ' if mark else ''}{note.text}  " for mark, note in _shown(table, lines)]
    about = [table.about, ""] if table.about else []
    head = [f"**{table.title}**", "", f"Source: {source(table)}", "", *about]
    return "\n".join([*head, *lines, "", *foot, *_left_out(comparison)]).rstrip()


def as_dict(name: str, table: Table, comparison: Comparison | None = None) -> dict[str, Any]:
    """Give a table as JSON-ready data.

    Args:
        name: the table's name.
        table: the table.
        comparison: a user's results, added under ``against``.

    Returns:
        The content of the data file, the source, and what sums and means are when recomputed.
    """
    told: dict[str, Any] = {"name": name, "source": source(table), **table.model_dump(mode="json")}
    told["recomputed"] = [
        {
            "row": entry.row,
            "column": entry.column,
            "printed": entry.printed,
            "value": round(entry.value, 4),
            "agrees": entry.agrees,
        }
        for entry in recompute(table)
    ]
    if comparison is not None:
        told["against"] = [
            {
                "method": row.method,
                "row": row.row,
                "published": dict(row.published),
                "yours": {key: round(value, 4) for key, value in row.yours.items()},
                "difference": {key: round(value, 4) for key, value in row.difference.items()},
            }
            for row in comparison.rows
        ]
        told["left_out"] = list(comparison.left_out)
    return told


def footnotes(table: Table) -> list[tuple[str, Note]]:
    """List the footnotes with their marks.

    Args:
        table: the table.

    Returns:
        Mark and note; the mark is empty for notes about the whole table, which come last.
    """
    marked = [note for note in table.notes if note.cells]
    whole = [note for note in table.notes if not note.cells]
    numbered = [(f"[{number}]", note) for number, note in enumerate(marked, start=1)]
    return [*numbered, *(("", note) for note in whole)]


def _shown(table: Table, lines: Sequence[str]) -> list[tuple[str, Note]]:
    """Leave out footnotes whose mark is on a row that is not drawn."""
    drawn = "\n".join(lines)
    return [(mark, note) for mark, note in footnotes(table) if mark in drawn]


def _marks(table: Table, row: str | None, column: str | None) -> str:
    """Return the marks of a cell; of a row's name or a heading, those of all of its cells."""
    return "".join(
        mark
        for mark, note in footnotes(table)
        for place in note.cells
        if (place.row, place.column) == (row, column)
    )


def _grid(table: Table, comparison: Comparison | None) -> Grid:
    headings = [
        column.name
        + (f" ({column.unit})" if column.unit else "")
        + _marks(table, None, column.name)
        for column in table.columns
    ]
    if comparison is None:
        return [["", *headings], *([_label(table, row.name), *_cells(table, row.name)]
                                   for row in table.rows)]  # fmt: skip
    grid = [["", "", *headings]]
    for row in comparison.rows:
        name = row.method
        if row.row is not None:
            grid.append([_label(table, row.row), "published", *_cells(table, row.row)])
            name = "" if row.method == row.row else row.method
        grid.append([name, "yours", *_line(table, row.yours)])
        if row.row is not None:
            signed = [_number(column, row.difference.get(column.name), "+")
                      for column in table.columns]  # fmt: skip
            grid.append(["", "difference", *signed])
    return grid


def _label(table: Table, row: str) -> str:
    return row + _marks(table, row, None)


def _cells(table: Table, row: str) -> list[str]:
    """Return a printed row, each cell with its marks."""
    return [
        _number(column, table.value(row, column.name)) + _marks(table, row, column.name)
        for column in table.columns
    ]


def _line(table: Table, values: Any) -> list[str]:
    return [_number(column, values.get(column.name)) for column in table.columns]


def _number(column: Column, value: Value, sign: str = "") -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:{sign}.{column.decimals}f}"


def _align(grid: Grid) -> list[str]:
    """Pad cells: names to the left, numbers to the right with their marks behind them."""
    names = 2 if grid[0][1] == "" else 1
    columns = [
        _left(column) if number < names else _right(column)
        for number, column in enumerate(zip(*grid, strict=True))
    ]
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]


def _left(column: Sequence[str]) -> list[str]:
    width = max(len(cell) for cell in column)
    return [cell.ljust(width) for cell in column]


def _right(column: Sequence[str]) -> list[str]:
    """Align the numbers below the heading; marks stand behind and may need room."""
    parts = [cell.partition("[") for cell in column[1:]]
    behind = max((len(bracket + rest) for _, bracket, rest in parts), default=0)
    cells = [number + (bracket + rest).ljust(behind) for number, bracket, rest in parts]
    width = max(len(cell) for cell in (column[0], *cells))
    return [cell.rjust(width) for cell in (column[0], *cells)]


def _records(table: Table) -> list[str]:
    """Give rows of words as paragraphs, which a table would squeeze."""
    lines = []
    for row in table.rows:
        lines.append(row.name)
        for column, value in zip(table.columns, row.values, strict=True):
            if value is not None:
                hang = " " * (4 + len(column.name))
                told = f"  {column.name}: {value}"
                lines += textwrap.wrap(told, WIDTH, subsequent_indent=hang, break_on_hyphens=False)
    return lines


def _note(mark: str, note: Note) -> list[str]:
    hang = " " * (len(mark) + 1) if mark else ""
    return textwrap.wrap(
        f"{mark} {note.text}".strip(), WIDTH, subsequent_indent=hang, break_on_hyphens=False
    )


def _left_out(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return []
    told = []
    if comparison.left_out:
        told.append(f"not in this table: {', '.join(comparison.left_out)}")
    if unknown := [row.method for row in comparison.rows if row.row is None]:
        told.append(f"no published row for: {', '.join(unknown)}")
    return told
