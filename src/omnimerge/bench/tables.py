"""Results of several seeds as one table: mean ± deviation, the best of each column marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omnimerge.bench import results
from omnimerge.bench.line import BenchError
from omnimerge.bench.results import Results, Row, mean
from omnimerge.bench.runner import built_folders

AVERAGE = "average"
_ORDER = {"base": 0, "expert": 1, "method": 2, "search": 3, "reference": 4, "refused": 5}


@dataclass(frozen=True)
class Cell:
    """A number over seeds: mean, and deviation where there are two seeds or more."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        """Summarise one number per seed.

        Args:
            values: at least one.

        Returns:
            Mean and sample deviation (n - 1).
        """
        middle = mean(values)
        if len(values) < 2:
            return cls(middle, None)
        squares = sum((value - middle) ** 2 for value in values)
        return cls(middle, math.sqrt(squares / (len(values) - 1)))

    def text(self, factor: float = 100.0, digits: int = 1) -> str:
        """Write the number.

        Args:
            factor: what it is multiplied by.
            digits: after the point.

        Returns:
            Such as ``61.3 ± 0.8``.
        """
        told = f"{factor * self.mean:.{digits}f}"
        if self.deviation is None:
            return told
        return f"{told} ± {factor * self.deviation:.{digits}f}"


@dataclass(frozen=True)
class TableRow:
    """One row of a table.

    Attributes:
        name: of the model or method.
        kind: what it is.
        seeds: how many seeds have it.
        cells: column -> number; `AVERAGE` too. Empty for a refused method.
        gain: its average less the base's, seed by seed; None for the base and refused methods.
        best: columns in which it is the best method.
        seconds: time of the merge.
        peak_bytes: memory of the merge.
        chosen: the chosen values of what was searched, one per seed.
        reason: why a method was refused.
    """

    name: str
    kind: str
    seeds: int
    cells: dict[str, Cell]
    gain: Cell | None
    best: frozenset[str]
    seconds: Cell | None
    peak_bytes: Cell | None
    chosen: tuple[float, ...]
    reason: str


@dataclass(frozen=True)
class Table:
    """The results of a line and preset.

    Attributes:
        line: the line.
        preset: the preset.
        seeds: which seeds.
        columns: the tasks.
        lines: base, experts, methods by average, choices by search, references, refused methods.
    """

    line: str
    preset: str
    seeds: tuple[int, ...]
    columns: tuple[str, ...]
    lines: tuple[TableRow, ...]


def read_results(path: Path) -> list[Results]:
    """Read the results of a run.

    Args:
        path: what ``bench build`` wrote, one seed of it, or a ``results.json``; or a folder of
            such files.

    Returns:
        One per seed.

    Raises:
        BenchError: if there is none.
    """
    if path.is_file():
        return [results.read(Results, path)]
    seed = any((path / name).is_file() for name in (results.RESULTS_NAME, results.BUILD_NAME))
    files = sorted(path.glob("*.json")) if not seed else []
    if not files:
        files = [place / results.RESULTS_NAME for place in built_folders(path)]
        missing = [str(file.parent) for file in files if not file.is_file()]
        if missing:
            raise BenchError(
                f"{', '.join(missing)}: no results yet; make them: omnimerge bench run"
            )
    return [results.read(Results, file) for file in files]


def make_tables(found: Sequence[Results]) -> list[Table]:
    """Summarise results over seeds.

    Args:
        found: any number of results.

    Returns:
        One table per line and preset.

    Raises:
        BenchError: if a seed is given twice, or seeds were asked other questions or other scales.
    """
    groups: dict[tuple[str, str], list[Results]] = {}
    for each in found:
        groups.setdefault((each.line, each.preset), []).append(each)
    return [_table(group) for group in groups.values()]


def _table(group: Sequence[Results]) -> Table:
    seeds = tuple(each.seed for each in group)
    first = group[0]
    if len(set(seeds)) < len(seeds):
        raise BenchError(f"{first.line} {first.preset}: a seed is given twice: {list(seeds)}")
    where = f"{first.line} {first.preset}"
    if any(each.columns != first.columns for each in group):
        raise BenchError(f"{where}: the seeds have other columns; run all with one version")
    rows: dict[tuple[str, str], list[Row]] = {}
    for each in group:
        for row in each.rows:
            rows.setdefault((row.kind, row.name), []).append(row)
    for (_, name), found in rows.items():
        if any(row.asked != found[0].asked for row in found):
            raise BenchError(f"{where}: {name} was run with other scales by seed; run all again")
    columns = (*first.columns, AVERAGE)
    cells = {key: _cells(found, columns) for key, found in rows.items()}
    best = {
        column: max(
            (row[column].mean for (kind, _), row in cells.items() if kind == "method"), default=0.0
        )
        for column in columns
    }
    gains = _gains(group)
    made = [_line(key, found, cells[key], gains.get(key), best) for key, found in rows.items()]
    ordered = sorted(made, key=lambda line: (_ORDER[line.kind], _rank(line)))
    return Table(first.line, first.preset, seeds, first.columns, tuple(ordered))


def _rank(line: TableRow) -> float:
    """Methods by average, the others as they come."""
    return -line.cells[AVERAGE].mean if line.kind in ("method", "search") else 0.0


def _cells(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, Cell]:
    scored = [{**row.scores, AVERAGE: row.average or 0.0} for row in rows if row.scores]
    return {column: Cell.of([row[column] for row in scored]) for column in columns if scored}


def _gains(group: Sequence[Results]) -> dict[tuple[str, str], Cell]:
    """Averages against the base of the same seed, whose own differ more than what is compared."""
    found: dict[tuple[str, str], list[float]] = {}
    for each in group:
        base = next((row.average for row in each.rows if row.kind == "base"), None)
        for row in each.rows:
            if row.kind != "base" and row.average is not None and base is not None:
                found.setdefault((row.kind, row.name), []).append(row.average - base)
    return {key: Cell.of(values) for key, values in found.items()}


def _line(
    key: tuple[str, str],
    rows: Sequence[Row],
    cells: dict[str, Cell],
    gain: Cell | None,
    best: dict[str, float],
) -> TableRow:
    kind, name = key
    seconds = [row.seconds for row in rows if row.seconds is not None]
    peaks = [float(row.peak_bytes) for row in rows if row.peak_bytes is not None]
    swept = [row.parameters.get("scale", row.parameters.get("alpha")) for row in rows]
    marked = {c for c, cell in cells.items() if kind == "method" and cell.mean == best[c]}
    return TableRow(
        name=name,
        kind=kind,
        seeds=len(rows),
        cells=cells,
        gain=gain,
        best=frozenset(marked),
        seconds=Cell.of(seconds) if seconds else None,
        peak_bytes=Cell.of(peaks) if peaks else None,
        chosen=tuple(value for value in swept if isinstance(value, float)),
        reason=rows[0].reason,
    )


def header(table: Table) -> list[str]:
    """Name the columns of `body`.

    Args:
        table: the table.

    Returns:
        The names.
    """
    return ["", *table.columns, AVERAGE, "gain", "scale", "seconds", "MB"]


def body(table: Table) -> list[list[str]]:
    """Write the rows that have numbers; the best method of a column has a star.

    Args:
        table: the table.

    Returns:
        Rows of text; percentages.
    """
    return [_texts(table, line) for line in table.lines if line.cells]


def refused(table: Table) -> list[tuple[str, str]]:
    """List the methods that were not run.

    Args:
        table: the table.

    Returns:
        (method, reason) pairs.
    """
    return [(line.name, line.reason) for line in table.lines if not line.cells]


_TITLES = {"expert": "expert {}", "search": "{}, scale by search"}


def _texts(table: Table, line: TableRow) -> list[str]:
    name = _TITLES.get(line.kind, "{}").format(line.name)
    if line.seeds < len(table.seeds):
        name += f" ({line.seeds} of {len(table.seeds)} seeds)"
    numbers = [
        line.cells[column].text() + ("*" if column in line.best else "")
        for column in (*table.columns, AVERAGE)
    ]
    scale = scales(line.chosen)
    seconds = line.seconds.text(1.0, 2) if line.seconds else ""
    peak = line.peak_bytes.text(1e-6, 1) if line.peak_bytes else ""
    gain = line.gain.text() if line.gain else ""
    return [name, *numbers, gain, scale, seconds, peak]


def scales(chosen: Sequence[float]) -> str:
    """Write what the seeds chose.

    Args:
        chosen: one value per seed.

    Returns:
        The values, or the one that all chose.
    """
    every = list(dict.fromkeys(chosen))
    return " ".join(f"{value:g}" for value in (every if len(every) == 1 else chosen))


def markdown(table: Table) -> str:
    """Write a table for a page.

    Args:
        table: the table.

    Returns:
        Markdown, with the best of each column in bold.
    """
    rows = [header(table), *body(table)]
    bold = [[f"**{cell[:-1]}**" if cell.endswith("*") else cell for cell in row] for row in rows]
    rule = "|---|" + "--:|" * (len(rows[0]) - 1)
    lines = [f"| {' | '.join(row)} |" for row in bold]
    told = "\n".join([lines[0], rule, *lines[1:]])
    missing = [f"- {name}: {reason}" for name, reason in refused(table)]
    return "\n".join([told, "", "Not run:", "", *missing]) if missing else told
