"""What a file of published results may hold: tables with marked cells, papers, models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Value = float | str | None
"""A cell: a number, a text, or nothing where nothing is reported."""

Name = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """A part of a file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Column(Strict):
    """One column.

    Attributes:
        name: Its heading.
        kind: `score` is 0 to 100, more is better; the others are not scores.
        formula: How the printed values come from others: the `mean` or `sum` of columns, or the
            `gain` of a row's SUM over the mean SUM of two rows.
        of: The columns of a `mean` or `sum` (default: all scores), the two rows of a `gain`.
        unit: Such as ``hours``.
        decimals: How many are printed.
    """

    name: Name
    kind: Literal["score", "count", "cost", "setting", "difference", "text"] = "score"
    formula: Literal["mean", "sum", "gain"] | None = None
    of: tuple[str, ...] = ()
    unit: str | None = None
    decimals: int = 2


class Row(Strict):
    """One row; `method` is omnimerge's name of the merging method, where there is one."""

    name: Name
    method: str | None = None
    values: tuple[Value, ...]


class Place(Strict):
    """A cell, or all cells of a row or of a column."""

    row: str | None = None
    column: str | None = None


class Note(Strict):
    """A footnote: about the table, or about some of its cells.

    Attributes:
        text: What is to be known.
        cells: Where its mark stands; nowhere where it is about the whole table.
        recomputed: What a wrong cell should hold.
    """

    text: Name
    cells: tuple[Place, ...] = ()
    recomputed: float | None = None


class Table(Strict):
    """One published table.

    Attributes:
        title: What it shows.
        paper: A key of the catalogue's papers.
        where: Its number in the paper.
        read_from: Where the numbers were read, if it was not the paper.
        about: More words.
        columns: The columns after the row's name.
        rows: The rows.
        notes: The footnotes.
    """

    title: Name
    paper: Name
    where: Name
    read_from: str | None = None
    about: str | None = None
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[Note, ...] = ()

    @model_validator(mode="after")
    def _is_complete(self) -> Table:
        for row in self.rows:
            if len(row.values) != len(self.columns):
                raise ValueError(
                    f"row {row.name!r}: {len(row.values)} values for {len(self.columns)} columns"
                )
        rows, columns = [row.name for row in self.rows], self.column_names
        for names in (rows, list(columns)):
            if len(set(names)) != len(names):
                raise ValueError(f"names are given twice in {names}")
        for column in self.columns:
            known = rows if column.formula == "gain" else columns
            if unknown := set(column.of) - set(known):
                raise ValueError(f"column {column.name!r}: of: {sorted(unknown)} do not exist")
        for place in (place for note in self.notes for place in note.cells):
            if place.row not in (None, *rows) or place.column not in (None, *columns):
                raise ValueError(f"notes: {place.row!r}, {place.column!r} is no place")
        return self

    @property
    def column_names(self) -> tuple[str, ...]:
        """The headings."""
        return tuple(column.name for column in self.columns)

    def value(self, row: str, column: str) -> Value:
        """Look a cell up.

        Args:
            row: its row's name.
            column: its heading.

        Returns:
            What is printed there.
        """
        values = next(entry.values for entry in self.rows if entry.name == row)
        return values[self.column_names.index(column)]


class Paper(Strict):
    """Where tables come from."""

    title: Name
    authors: Name
    venue: Name
    url: str | None = None
    read_from: Name


class Model(Strict):
    """A checkpoint that an experiment used.

    Attributes:
        name: What the papers call it.
        paper: Which paper.
        role: What it is there.
        hub: Its id on the Hugging Face Hub; None where it is unknown.
        base: What it was fine-tuned from, where it is an expert.
        tuning: How it was fine-tuned, where it is an expert.
        capability: What it was fine-tuned for.
        note: More words.
    """

    name: Name
    paper: Name
    role: Literal["base", "expert", "target", "donor", "reference"]
    hub: str | None = None
    base: str | None = None
    tuning: Literal["full", "LoRA"] | None = None
    capability: str | None = None
    note: str | None = None


class HarnessMetric(Strict):
    """Where lmms-eval has a number: in `task`, the sum of `metrics`, times `factor`.

    Attributes:
        task: The task's name there.
        metrics: Their names in current versions.
        older: What older versions call a metric, by its current name.
        factor: What makes a percentage of the sum.
    """

    task: Name
    metrics: tuple[Name, ...]
    older: dict[str, str] = {}
    factor: float


class HarnessFile(Strict):
    """Where VLMEvalKit has a number: in the file of `dataset`, the mean of `rows`, times `factor`.

    Attributes:
        dataset: The data set's name there, which is in the file's name.
        rows: The first cells of the rows that count; empty: the file has one row.
        columns: Whose sum the number of a row is.
        factor: What makes a percentage of the number.
    """

    dataset: Name
    rows: tuple[Name, ...] = ()
    columns: tuple[Name, ...] = ("Overall",)
    factor: float


class Evaluation(Strict):
    """How the numbers of a column were made.

    Attributes:
        column: The heading in the tables.
        papers: Whose tables have it.
        dataset: What is asked.
        split: Which part of it.
        metric: How it is scored.
        vlmevalkit: Where VLMEvalKit has it.
        lmms_eval: Where lmms-eval has it.
        note: What to take care of.
    """

    column: Name
    papers: tuple[Name, ...]
    dataset: Name
    split: str | None = None
    metric: Name
    vlmevalkit: HarnessFile | None = None
    lmms_eval: HarnessMetric | None = None
    note: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every way to write the column: its heading, and its names in the harnesses."""
        own = (self.vlmevalkit and self.vlmevalkit.dataset, self.lmms_eval and self.lmms_eval.task)
        return (self.column, *(name for name in own if name))


class Catalogue(Strict):
    """What the tables are about."""

    papers: dict[str, Paper]
    models: tuple[Model, ...]
    evaluations: tuple[Evaluation, ...]
