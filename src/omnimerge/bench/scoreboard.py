"""Scores of runs as boards of the page: one row per model, means over the seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from omnimerge.bench import lines, results
from omnimerge.bench.line import BenchError
from omnimerge.bench.page import Board, Kind, ScaleCurve, Scored
from omnimerge.bench.results import Point, Results, mean
from omnimerge.bench.tables import AVERAGE, Cell, Table, TableRow, make_tables, scales

_KINDS: dict[str, Kind] = {
    "base": "base",
    "expert": "expert",
    "method": "merged",
    "search": "merged",
    "reference": "reference",
}


def scored_boards(folders: Sequence[Path]) -> list[Board]:
    """Read the runs in folders, their subfolders included.

    Args:
        folders: of one or more runs; files may be given, too.

    Returns:
        One board per line and preset; empty if nothing was run there.

    Raises:
        BenchError: if a file of results is damaged, or a seed is there twice.
    """
    found = [results.read(Results, file) for file in _files(folders)]
    boards = []
    for table in make_tables(found):
        runs = [each for each in found if (each.line, each.preset) == (table.line, table.preset)]
        boards.append(_board(table, runs, named=_presets(found, table.line) > 1))
    return boards


def _files(folders: Iterable[Path]) -> list[Path]:
    """Files of results, by what they hold; one that is given twice counts once."""
    files: dict[Path, None] = {}
    for folder in folders:
        below = sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]
        files |= dict.fromkeys(file.resolve() for file in below if _is_results(file))
    return list(files)


def _is_results(file: Path) -> bool:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and {"line", "preset", "columns", "rows"} <= held.keys()


def _presets(found: Sequence[Results], line: str) -> int:
    return len({each.preset for each in found if each.line == line})


def _board(table: Table, runs: Sequence[Results], *, named: bool) -> Board:
    name = f"{table.line}, {table.preset}" if named else table.line
    refused = [f"{row.name}: {row.reason}." for row in table.lines if not row.cells]
    return Board(
        name=name,
        about=_about(table.line),
        columns=table.columns,
        rows=tuple(_scored(table, row) for row in table.lines if row.cells),
        seeds=len(table.seeds),
        command=runs[0].environment.command,
        curves=tuple(_curves(runs)),
        notes=tuple(refused),
    )


def _about(line: str) -> str:
    try:
        return lines.get(line).about
    except BenchError:  # results of a line that this version does not have
        return ""


def _scored(table: Table, row: TableRow) -> Scored:
    cells = [row.cells[column] for column in table.columns]
    average = row.cells[AVERAGE]
    return Scored(
        name=f"{row.name}, scale by search" if row.kind == "search" else row.name,
        kind=_KINDS[row.kind],
        scores=tuple(cell.mean for cell in cells),
        deviations=tuple(cell.deviation for cell in cells),
        average=average.mean,
        average_deviation=average.deviation,
        scale=scales(row.chosen),
        seconds=row.seconds.mean if row.seconds else None,
        seconds_deviation=row.seconds.deviation if row.seconds else None,
        memory=row.peak_bytes.mean if row.peak_bytes else None,
    )


def _curves(runs: Sequence[Results]) -> list[ScaleCurve]:
    """The validation average over the scale, for the methods that have one in every run."""
    by_method: dict[str, list[dict[float, float]]] = {}
    for run in runs:
        for row in run.rows:
            values = {x: mean(p.scores.values()) for p in row.points if (x := _scale(p))}
            if row.kind == "method" and len(values) > 1:
                by_method.setdefault(row.name, []).append(values)
    curves = []
    for name, seeds in by_method.items():
        scales = sorted(set.intersection(*(set(each) for each in seeds)))
        cells = [Cell.of([each[scale] for each in seeds]) for scale in scales]
        spread = tuple(cell.deviation for cell in cells if cell.deviation is not None)
        curves.append(ScaleCurve(name, tuple(scales), tuple(c.mean for c in cells), spread))
    return curves


def _scale(point: Point) -> float | None:
    value = point.parameters.get("scale")
    return value if isinstance(value, float) else None
