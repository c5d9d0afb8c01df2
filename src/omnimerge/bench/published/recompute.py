"""Printed sums, means and gains, computed again from the cells that they are made of."""

from __future__ import annotations

from dataclasses import dataclass

from omnimerge.bench.published.schema import Column, Table, Value

_ROUNDING = 0.005
"""Half of the last of two printed decimals."""


@dataclass(frozen=True, slots=True)
class Recomputed:
    """A printed value that follows from others.

    Attributes:
        row: Its row.
        column: Its column.
        printed: What the paper has.
        value: What the cells give.
        slack: How far the two may be apart by rounding alone.
    """

    row: str
    column: str
    printed: float
    value: float
    slack: float

    @property
    def agrees(self) -> bool:
        """Whether rounding alone explains the difference."""
        return abs(self.printed - self.value) <= self.slack + 1e-9


def recompute(table: Table) -> list[Recomputed]:
    """Compute every sum, mean and gain of a table again.

    Args:
        table: the table.

    Returns:
        One entry per printed value that follows from other cells.
    """
    found = []
    for column in table.columns:
        for row in table.rows:
            printed = table.value(row.name, column.name)
            if column.formula is None or not isinstance(printed, float):
                continue
            cells = dict(zip(table.column_names, row.values, strict=True))
            if (value := derive(table, column, cells)) is None:
                continue
            slack = _slack(table, column, cells)
            found.append(Recomputed(row.name, column.name, printed, value, slack))
    return found


def derive(table: Table, column: Column, cells: dict[str, Value]) -> float | None:
    """Compute one cell by its column's formula.

    Args:
        table: the table.
        column: a column with a formula.
        cells: the row's cells, by column.

    Returns:
        The value; None where a cell that it needs is not there.
    """
    if column.formula == "gain":
        sums = [table.value(row, "SUM") for row in column.of]
        parts = [cells.get("SUM"), *sums]
        known = [part for part in parts if isinstance(part, float)]
        return known[0] - (known[1] + known[2]) / 2 if len(known) == len(parts) else None
    values = _parts(table, column, cells)
    if not values:
        return None
    return sum(values) / (len(values) if column.formula == "mean" else 1)


def _parts(table: Table, column: Column, cells: dict[str, Value]) -> list[float]:
    """Return the cells of a mean or a sum; those that are not reported are left out."""
    chosen = column.of or tuple(
        other.name for other in table.columns if other.kind == "score" and other.formula is None
    )
    return [value for name in chosen if isinstance(value := cells.get(name), float)]


def _slack(table: Table, column: Column, cells: dict[str, Value]) -> float:
    if column.formula == "gain":
        return 3 * _ROUNDING
    if column.formula == "mean":
        return 2 * _ROUNDING
    return (len(_parts(table, column, cells)) + 1) * _ROUNDING
