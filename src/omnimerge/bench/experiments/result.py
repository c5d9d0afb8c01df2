"""The schema of an experiment's file, and how those of several seeds become one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omnimerge.bench.line import BenchError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Curve(_Strict):
    """Numbers over one axis.

    Attributes:
        name: of the curve.
        x: where the points are, increasing.
        y: their values.
        deviation: standard deviation over the seeds; empty for one seed.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    deviation: tuple[float, ...] = ()


class Entry(_Strict):
    """One row of an experiment's table.

    Attributes:
        name: of the row.
        values: one per column; None where there is none.
        deviations: standard deviations over the seeds; empty for one seed.
    """

    name: str
    values: tuple[float | None, ...]
    deviations: tuple[float | None, ...] = ()


class Experiment(_Strict):
    """What one experiment found on one line.

    Attributes:
        kind: what the file is.
        name: of the experiment.
        title: for people.
        paper: where the paper has it.
        question: what it asks, and how.
        line: of the benchmark; empty for a recipe of one's own.
        preset: of the line.
        seeds: of the line, one per run.
        settings: what else decides the numbers.
        x: name of the curves' axis.
        y: name of their values.
        log_x: whether the axis is drawn logarithmic.
        log_y: whether the values are.
        curves: the curves; may be empty.
        levels: values to compare the curves with, by name.
        head: what the table's rows are.
        columns: of the table.
        digits: of the table's values.
        rows: of the table; may be empty.
        edges: of the bins of `shares`.
        shares: distributions by name, one number per bin; may be empty.
        outcome: what came out, in sentences made from the numbers.
        seconds: how long it took.
    """

    kind: Literal["experiment"] = "experiment"
    name: str
    title: str
    paper: str
    question: str
    line: str = ""
    preset: str = ""
    seeds: tuple[int, ...] = ()
    settings: dict[str, str | float | int] = Field(default_factory=dict)
    x: str = ""
    y: str = ""
    log_x: bool = False
    log_y: bool = False
    curves: tuple[Curve, ...] = ()
    levels: dict[str, float] = Field(default_factory=dict)
    head: str = "variant"
    columns: tuple[str, ...] = ()
    digits: int = 1
    rows: tuple[Entry, ...] = ()
    edges: tuple[float, ...] = ()
    shares: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    outcome: tuple[str, ...] = ()
    seconds: float = 0.0

    def write(self, file: Path) -> Path:
        """Write it as JSON.

        Args:
            file: the file.

        Returns:
            `file`.
        """
        from omnimerge.search.store import write_atomically

        return write_atomically(file, self.model_dump_json(indent=1) + "\n")

    def curve(self, name: str) -> Curve:
        """Return a curve.

        Args:
            name: its name.

        Returns:
            The curve.

        Raises:
            BenchError: if there is none of that name.
        """
        for each in self.curves:
            if each.name == name:
                return each
        raise BenchError(f"experiment {self.name} has no curve {name!r}")

    def row(self, name: str) -> Entry:
        """Return a row of the table.

        Args:
            name: its name.

        Returns:
            The row.

        Raises:
            BenchError: if there is none of that name.
        """
        for each in self.rows:
            if each.name == name:
                return each
        raise BenchError(f"experiment {self.name} has no row {name!r}")


def read_experiment(file: Path) -> Experiment:
    """Read an experiment.

    Args:
        file: what `Experiment.write` wrote.

    Returns:
        The experiment.

    Raises:
        BenchError: if it cannot be read or is none.
    """
    try:
        return Experiment.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"cannot read {file} ({error.strerror})") from error
    except (ValidationError, UnicodeDecodeError):
        raise BenchError(
            f"{file} holds no experiment; write one with `omnimerge bench experiment`"
        ) from None


def combined(
    results: Sequence[Experiment],
    outcome: Callable[[Experiment], Sequence[str]] | None = None,
) -> Experiment:
    """Take the mean over seeds.

    Args:
        results: one experiment on one line, by several seeds.
        outcome: makes its sentences anew from the means; default: those of the first stay.

    Returns:
        The means, with standard deviations. Distributions are those of the first seed.

    Raises:
        BenchError: if the experiments are not the same, or a seed is given twice.
    """
    first = results[0]
    if len(results) == 1:
        return first
    keys = {(e.name, e.line, e.preset, tuple(c.name for c in e.curves), e.columns) for e in results}
    if len(keys) > 1 or any(c.x != first.curve(c.name).x for e in results for c in e.curves):
        raise BenchError(f"experiment {first.name}: the files are not of one experiment")
    seeds = tuple(seed for e in results for seed in e.seeds)
    if len(set(seeds)) < len(seeds):
        where = f"{first.name}, {first.line} {first.preset}"
        raise BenchError(f"experiment {where}: a seed is given twice: {list(seeds)}")
    curves = tuple(
        Curve(
            name=curve.name,
            x=curve.x,
            **_moments([e.curve(curve.name).y for e in results], "y", "deviation"),
        )
        for curve in first.curves
    )
    rows = tuple(
        Entry(
            name=row.name,
            **_moments([e.row(row.name).values for e in results], "values", "deviations"),
        )
        for row in first.rows
    )
    levels = {name: statistics.fmean(e.levels[name] for e in results) for name in first.levels}
    made = first.model_copy(
        update={
            "curves": curves,
            "rows": rows,
            "levels": levels,
            "seeds": seeds,
            "seconds": sum(e.seconds for e in results),
        }
    )
    return made.model_copy(update={"outcome": tuple(outcome(made))}) if outcome else made


def averages_of(found: Experiment) -> tuple[list[float], list[float | None]]:
    """Return the column before the last, which is the average in tables of scores.

    Args:
        found: the experiment.

    Returns:
        The average of each row, and its deviation over the seeds; no deviations for one seed.
    """
    values = [row.values[-2] or 0.0 for row in found.rows]
    return values, [row.deviations[-2] for row in found.rows if row.deviations]


def _moments(
    columns: Sequence[Sequence[float | None]], mean: str, deviation: str
) -> dict[str, Any]:
    """Mean and standard deviation of each place over the runs, under these names."""
    means: list[float | None] = []
    spreads: list[float | None] = []
    for values in zip(*columns, strict=True):
        known = [value for value in values if value is not None]
        means.append(statistics.fmean(known) if known else None)
        spread = statistics.stdev(known) if len(known) > 1 else 0.0
        spreads.append(spread if known else None)
    return {mean: tuple(means), deviation: tuple(spreads)}
