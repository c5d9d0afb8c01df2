"""Scores of runs as boards of the page: one row per model, means over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omnimerge.bench import lines, results
from omnimerge.bench.boards import json_files
from omnimerge.bench.line import BenchError
from omnimerge.bench.page import Board, Kind, ScaleCurve, Scored
from omnimerge.bench.results import Point, Results, mean
from omnimerge.bench.tables import AVERAGE, Cell, Table, TableRow, make_tables, scales

_KINDS: dict[str, Kind] = {
    "base": "base",
    "expert": "expert",
    "method": "merged",
    "search": "search",
    "reference": "reference",
}
_HELD = {"line", "preset", "seed", "columns", "rows"}


def scored_boards(folders: Sequence[Path]) -> list[Board]:
    """Read the runs in folders, their subfolders included.

    Args:
        folders: of one or more runs; files may be given, too.

    Returns:
        One board per line and preset; empty if nothing was run there.

    Raises:
        BenchError: if a folder is not there, results are damaged, or a seed is there twice.
    """
    found = [
        results.read(Results, file) for file, held in json_files(folders) if held.keys() >= _HELD
    ]
    boards = []
    for table in make_tables(found):
        key = (table.line, table.preset)
        boards.append(_board(table, [each for each in found if (each.line, each.preset) == key]))
    return boards


def _board(table: Table, runs: Sequence[Results]) -> Board:
    refused = [f"{row.name}: {row.reason}." for row in table.lines if not row.cells]
    return Board(
        line=table.line,
        preset=table.preset,
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
    name = f"{row.name}, scale by search" if row.kind == "search" else row.name
    if row.seeds < len(table.seeds):
        name += f" ({row.seeds} of {len(table.seeds)} seeds)"
    return Scored(
        name=name,
        kind=_KINDS[row.kind],
        scores=tuple(cell.mean for cell in cells),
        deviations=tuple(cell.deviation for cell in cells),
        average=average.mean,
        average_deviation=average.deviation,
        gain=row.gain.mean if row.gain else None,
        gain_deviation=row.gain.deviation if row.gain else None,
        scale=scales(row.chosen),
        scale_mean=mean(row.chosen) if row.chosen else None,
        seconds=row.seconds.mean if row.seconds else None,
        seconds_deviation=row.seconds.deviation if row.seconds else None,
        memory=row.peak_bytes.mean if row.peak_bytes else None,
    )


def _curves(runs: Sequence[Results]) -> list[ScaleCurve]:
    """The validation average over the scale, for the methods that have one in every run."""
    by_method: dict[str, list[dict[float, float]]] = {}
    for run in runs:
        for row in run.rows:
            points = ((_scale(point), mean(point.scores.values())) for point in row.points)
            values = {scale: value for scale, value in points if scale is not None}
            if row.kind == "method" and len(values) > 1:
                by_method.setdefault(row.name, []).append(values)
    curves = []
    for name, seeds in by_method.items():
        shared = sorted(set.intersection(*(set(each) for each in seeds)))
        if len(seeds) < len(runs) or len(shared) < 2:
            continue
        cells = [Cell.of([each[scale] for each in seeds]) for scale in shared]
        spread = tuple(cell.deviation for cell in cells if cell.deviation is not None)
        curves.append(ScaleCurve(name, tuple(shared), tuple(c.mean for c in cells), spread))
    return curves


def _scale(point: Point) -> float | None:
    value = point.parameters.get("scale")
    return value if isinstance(value, float) else None
