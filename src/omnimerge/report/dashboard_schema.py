"""The schema of a dashboard: tables and charts as data, for one HTML page.

Any room may write such a file; `write_dashboard` reads it. It says what is shown, never how::

    {"title": "Five capabilities", "sections": [
      {"kind": "table", "title": "Scores", "head": "method",
       "columns": [{"name": "VQA", "digits": 1}],
       "rows": [{"name": "optmerge", "cells": [{"value": 61.2, "deviation": 0.4, "best": true}]}]}
    ]}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# NaN and infinity cannot be drawn; a value that is not known is null.
Number = Annotated[float, Field(allow_inf_nan=False)]
Values = tuple[Number | None, ...]
Digits = Annotated[int, Field(ge=0, le=12)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Section(_Strict):
    """What every section has.

    Attributes:
        title: its heading.
        group: heading over it and its neighbours of the same group; empty: none.
        text: paragraphs above it.
        notes: remarks below it.
        command: the command that made its numbers; empty: not shown.
    """

    title: str
    group: str = ""
    text: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""


class Cell(_Strict):
    """One cell of a table.

    Attributes:
        value: what it sorts by; None: there is none.
        deviation: ± of the value, if there are several runs.
        text: what is shown instead of the value, such as ``yes`` or ``12 MB``.
        best: whether it is the best of its column.
    """

    value: Number | None = None
    deviation: Annotated[Number, Field(ge=0)] | None = None
    text: str | None = None
    best: bool = False


class Column(_Strict):
    """One column of a table.

    Attributes:
        name: its head.
        unit: of its values, such as ``%`` or ``s``.
        digits: behind the decimal point.
        scientific: whether large and small values are written with a power of ten.
        title: what it is, in words.
    """

    name: str
    unit: str = ""
    digits: Digits = 1
    scientific: bool = False
    title: str = ""


class Row(_Strict):
    """One row of a table.

    Attributes:
        name: its head.
        cells: one per column; None where there is nothing to say.
        label: what kind of row it is, such as ``expert``; shown beside the name.
        emphasis: whether it stands out.
        title: what it is, in words.
    """

    name: str
    cells: tuple[Cell | None, ...]
    label: str = ""
    emphasis: bool = False
    title: str = ""


class Table(_Section):
    """A table.

    Attributes:
        kind: ``table``.
        head: what the rows are.
        columns: the columns.
        rows: the rows.
        sortable: whether a reader may sort it.
    """

    kind: Literal["table"] = "table"
    head: str = ""
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    sortable: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Table:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"row {row.name!r} has {len(row.cells)} cells, not one per column")
        return self


class Series(_Strict):
    """One value per category, axis or bin.

    Attributes:
        name: its name.
        values: one per category; None where there is none.
        deviations: ± of the values; empty: none.
        emphasis: whether it stands out.
    """

    name: str
    values: Values
    deviations: Values = ()
    emphasis: bool = False


class Bars(_Section):
    """Horizontal bars, grouped by category.

    Attributes:
        kind: ``bars``.
        head: what the categories are.
        categories: names of the groups, from top to bottom.
        series: the bars of each group.
        axis: what their length means.
        unit: of the values.
        digits: behind the decimal point.
        emphasis: categories that stand out.
    """

    kind: Literal["bars"] = "bars"
    head: str = ""
    categories: tuple[str, ...] = Field(min_length=1)
    series: tuple[Series, ...] = Field(min_length=1)
    axis: str = ""
    unit: str = ""
    digits: Digits = 1
    emphasis: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Bars:
        _check_series(self.series, len(self.categories), "category")
        return self


class Radar(_Section):
    """One polygon per series over axes that have a scale in common.

    Attributes:
        kind: ``radar``.
        axes: names of the axes, from the top, clockwise.
        series: the polygons; None in one of them is a gap.
        low: value in the middle.
        high: value at the rim.
        apart: a small radar for each series, instead of one with all.
        references: with `apart`: series that are outlined in each of them instead.
        unit: of the values.
        digits: behind the decimal point.
    """

    kind: Literal["radar"] = "radar"
    axes: tuple[str, ...] = Field(min_length=3)
    series: tuple[Series, ...] = Field(min_length=1)
    low: Number = 0.0
    high: Number
    apart: bool = False
    references: tuple[str, ...] = ()
    unit: str = ""
    digits: Digits = 1

    @model_validator(mode="after")
    def _fits(self) -> Radar:
        _check_series(self.series, len(self.axes), "axis")
        unknown = set(self.references) - {each.name for each in self.series}
        if unknown:
            raise ValueError(f"references: no series {sorted(unknown)[0]!r}")
        if self.low >= self.high:
            raise ValueError("low: not below high")
        return self


class Line(_Strict):
    """One curve.

    Attributes:
        name: its name.
        x: where its points are, increasing.
        y: their values; None is a gap.
        low: lower edge of its band; empty: no band.
        high: upper edge of its band.
        emphasis: whether it stands out.
    """

    name: str
    x: tuple[Number, ...] = Field(min_length=1)
    y: Values
    low: Values = ()
    high: Values = ()
    emphasis: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Line:
        bands = [band for band in (self.low, self.high) if band]
        if len(bands) == 1 or any(len(each) != len(self.x) for each in (self.y, *bands)):
            raise ValueError(f"line {self.name!r}: y, low and high need one value per x")
        if list(self.x) != sorted(set(self.x)):
            raise ValueError(f"line {self.name!r}: x has to increase")
        return self


class Lines(_Section):
    """Curves over one number.

    Attributes:
        kind: ``lines``.
        x: what is on the horizontal axis.
        y: what is on the vertical axis.
        lines: the curves.
        log_x: whether the horizontal axis is logarithmic; a point at 0 is drawn at its start.
        log_y: whether the vertical axis is logarithmic.
        digits: significant digits of the values.
        levels: horizontal lines to compare with, by name.
    """

    kind: Literal["lines"] = "lines"
    x: str
    y: str
    lines: tuple[Line, ...] = Field(min_length=1)
    log_x: bool = False
    log_y: bool = False
    digits: Digits = 4
    levels: dict[str, Number] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Lines:
        values = [v for line in self.lines for v in (*line.y, *line.low) if v is not None]
        if self.log_y and min([*values, *self.levels.values()], default=1) <= 0:
            raise ValueError("log_y: a value is not above 0")
        if self.log_x and any(x < 0 for line in self.lines for x in line.x):
            raise ValueError("log_x: a place is below 0")
        return self


class Heatmap(_Section):
    """Numbers over two lists of labels, as a coloured table.

    Attributes:
        kind: ``heatmap``.
        down: what the rows are.
        across: what the columns are.
        rows: labels.
        columns: labels.
        values: one tuple per row; None where there is no value.
        low: value of the palest colour; default: 0, or the smallest below it.
        high: value of the deepest colour; default: the largest.
        digits: behind the decimal point.
        scale: what the colours mean.
    """

    kind: Literal["heatmap"] = "heatmap"
    down: str = ""
    across: str = ""
    rows: tuple[str, ...] = Field(min_length=1)
    columns: tuple[str, ...] = Field(min_length=1)
    values: tuple[Values, ...]
    low: Number | None = None
    high: Number | None = None
    digits: Digits = 2
    scale: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Heatmap:
        widths = {len(row) for row in self.values}
        if len(self.values) != len(self.rows) or widths - {len(self.columns)}:
            raise ValueError("values: not one per row and column")
        return self


class Histogram(_Section):
    """Distributions over bins that they have in common.

    Attributes:
        kind: ``histogram``.
        x: what is on the horizontal axis.
        y: what is on the vertical axis.
        edges: of the bins, increasing, one more than bins.
        log_x: whether the horizontal axis is logarithmic.
        series: the distributions.
        digits: significant digits of the values.
    """

    kind: Literal["histogram"] = "histogram"
    x: str
    y: str
    edges: tuple[Number, ...] = Field(min_length=2)
    log_x: bool = False
    series: tuple[Series, ...] = Field(min_length=1)
    digits: Digits = 4

    @model_validator(mode="after")
    def _fits(self) -> Histogram:
        _check_series(self.series, len(self.edges) - 1, "bin")
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError("edges: have to increase")
        if self.log_x and self.edges[0] <= 0:
            raise ValueError("edges: have to be above 0 on a logarithmic axis")
        return self


Section = Annotated[Table | Bars | Radar | Lines | Heatmap | Histogram, Field(discriminator="kind")]


class Fact(_Strict):
    """A number at the top of the page.

    Attributes:
        name: what it is.
        value: the number, as text.
        detail: smaller, beside it.
    """

    name: str
    value: str
    detail: str = ""


class Dashboard(_Strict):
    """One page of tables and charts.

    Attributes:
        title: its heading.
        eyebrow: a line above the heading.
        intro: paragraphs below it.
        facts: the numbers that matter most.
        sections: what it shows; neighbours of one group are under one heading.
    """

    title: str
    eyebrow: str = "omnimerge"
    intro: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    sections: tuple[Section, ...] = Field(min_length=1)


def _check_series(series: Sequence[Series], count: int, what: str) -> None:
    names = [each.name for each in series]
    if len(set(names)) < len(names):
        raise ValueError("series: two have the same name")
    for each in series:
        if len(each.values) != count:
            raise ValueError(f"series {each.name!r}: not one value per {what}")
        if each.deviations and len(each.deviations) != count:
            raise ValueError(f"series {each.name!r}: not one deviation per {what}")
