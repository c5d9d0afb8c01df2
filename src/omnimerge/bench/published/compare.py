"""A published table beside a user's own numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from omnimerge.bench.published.harnesses import ResultsError
from omnimerge.bench.published.recompute import derive
from omnimerge.bench.published.results import Results
from omnimerge.bench.published.schema import Column, Table, Value
from omnimerge.bench.published.tables import catalogue, plain


@dataclass(frozen=True, slots=True)
class Compared:
    """One method of the user's.

    Attributes:
        method: Its name in the user's file.
        row: The row of the table; None where the table has no such method.
        published: Column to the printed number.
        yours: Column to the user's number; sums and means computed where all parts are there.
        difference: Column to the second minus the first.
    """

    method: str
    row: str | None
    published: Mapping[str, float]
    yours: Mapping[str, float]
    difference: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All methods of the user's; `left_out` are columns that the table does not have."""

    rows: tuple[Compared, ...]
    left_out: tuple[str, ...]


def compare(table: Table, results: Results) -> Comparison:
    """Put a user's results beside a table.

    Methods are found by the row's name or by omnimerge's name of the method, columns by the
    heading or by VLMEvalKit's or lmms-eval's name of it; case, spaces and hyphens do not matter.

    Args:
        table: the table.
        results: the user's numbers.

    Returns:
        The comparison.

    Raises:
        ResultsError: if no column of the results is in the table, or if two are the same.
    """
    columns = _columns(table)
    rows, left_out = [], []
    for method, given in results.items():
        yours: dict[str, float] = {}
        for name, value in given.items():
            column = columns.get(plain(name))
            if column is None:
                left_out.append(name)
            elif column in yours:
                raise ResultsError(f"{method}: two columns are {column}, the second is {name!r}")
            else:
                yours[column] = value
        rows.append(_compare_row(table, method, yours))
    if not any(row.yours for row in rows):
        raise ResultsError(
            f"none of the columns {', '.join(dict.fromkeys(left_out))} is in this table: "
            f"{', '.join(table.column_names)}"
        )
    return Comparison(tuple(rows), tuple(dict.fromkeys(left_out)))


def _columns(table: Table) -> dict[str, str]:
    """Map every way to write a heading to the heading."""
    known = {plain(name): name for name in table.column_names}
    for entry in catalogue().evaluations:
        if entry.column in table.column_names:
            known |= {plain(name): entry.column for name in entry.names}
    return known


def _compare_row(table: Table, method: str, yours: dict[str, float]) -> Compared:
    asked = plain(method)
    row = next((r for r in table.rows if asked in (plain(r.name), plain(r.method or ""))), None)
    printed = dict(zip(table.column_names, row.values, strict=True)) if row else {}
    published = _numbers(printed.items())
    for column in table.columns:
        if column.formula and column.name not in yours and _has_parts(table, column, yours):
            value = derive(table, column, dict(yours))
            if value is not None:
                yours[column.name] = value
    difference = {name: yours[name] - published[name] for name in yours if name in published}
    return Compared(method, row.name if row else None, published, yours, difference)


def _numbers(cells: Iterable[tuple[str, Value]]) -> dict[str, float]:
    return {name: value for name, value in cells if isinstance(value, float)}


def _has_parts(table: Table, column: Column, yours: Mapping[str, float]) -> bool:
    """Tell whether every part of a sum or mean is given: a mean of fewer would mislead."""
    if column.formula == "gain":
        return "SUM" in yours
    parts = column.of or [c.name for c in table.columns if c.kind == "score" and not c.formula]
    return set(parts) <= set(yours)
