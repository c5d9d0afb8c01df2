"""The published tables, read from the package's data files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from omnimerge.bench.published.schema import Catalogue, Column, Row, Table, Value
from omnimerge.checkpoint.yaml_file import read_mapping
from omnimerge.errors import OmnimergeError, suggestion

_DATA = Path(__file__).parent / "data"
_FROM_CATALOGUE = ("models", "evaluations")

_Content = TypeVar("_Content", bound=BaseModel)


class UnknownTableError(OmnimergeError):
    """There is no published table of this name."""


@cache
def names() -> tuple[str, ...]:
    """List the tables.

    Returns:
        The names that `table` takes: by paper, in the paper's order, then those of the catalogue.
    """
    found = [file.stem for file in (_DATA / "tables").glob("*.yaml")]
    return (*sorted(found, key=_order), *_FROM_CATALOGUE)


def _order(name: str) -> tuple[str, int, str]:
    paper, _, number = name.partition("-")
    return paper, int(number) if number.isdigit() else 10**6, number


@cache
def table(name: str) -> Table:
    """Read one table.

    Args:
        name: one of `names`.

    Returns:
        The table.

    Raises:
        UnknownTableError: if there is none of this name.
    """
    if name not in names():
        raise UnknownTableError(
            f"no published table {name!r}{suggestion(name, names())}; "
            "`omnimerge bench published` lists them"
        )
    if name == "models":
        return _models()
    if name == "evaluations":
        return _evaluations()
    return read(_DATA / "tables" / f"{name}.yaml", Table)


@cache
def catalogue() -> Catalogue:
    """Read what the tables are about.

    Returns:
        Papers, models and evaluations.
    """
    return read(_DATA / "catalogue.yaml", Catalogue)


def plain(name: str) -> str:
    """Write a name so that names which mean the same are equal.

    Args:
        name: of a column or row.

    Returns:
        The name without case, spaces and hyphens.
    """
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def read(file: Path, kind: type[_Content]) -> _Content:
    """Read a data file.

    Args:
        file: a YAML file.
        kind: what it must hold.

    Returns:
        Its content.

    Raises:
        OmnimergeError: if it is not YAML, or holds something else; with the key.
    """
    try:
        return kind.model_validate(read_mapping(file))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise OmnimergeError(f"{file.name}: {key}: {first['msg']}") from error
    except ValueError as error:
        raise OmnimergeError(f"cannot read {file}: {error}") from error


def _models() -> Table:
    columns = ("paper", "role", "checkpoint", "fine-tuned from", "tuning", "capability", "note")
    rows = [
        (
            model.name,
            (
                model.paper,
                model.role,
                model.hub or "unknown",
                model.base,
                model.tuning,
                model.capability,
                model.note,
            ),
        )
        for model in catalogue().models
    ]
    return _texts("Base models, experts, targets and donors", columns, rows)


def _evaluations() -> Table:
    columns = ("papers", "dataset", "split", "metric", "VLMEvalKit", "lmms-eval", "note")
    rows = [
        (
            entry.column,
            (
                ", ".join(entry.papers),
                entry.dataset,
                entry.split,
                entry.metric,
                _named(entry.vlmevalkit.dataset, entry.vlmevalkit.columns)
                if entry.vlmevalkit
                else None,
                _named(entry.lmms_eval.task, entry.lmms_eval.metrics) if entry.lmms_eval else None,
                entry.note,
            ),
        )
        for entry in catalogue().evaluations
    ]
    return _texts("Data sets, splits and metrics of the tables' columns", columns, rows)


def _named(task: str, numbers: Sequence[str]) -> str:
    return f"{task}: {' + '.join(numbers)}"


def _texts(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, tuple[Value, ...]]]
) -> Table:
    return Table(
        title=title,
        paper="all",
        where="set-up of all papers",
        columns=tuple(Column(name=name, kind="text") for name in columns),
        rows=tuple(Row(name=name, values=values) for name, values in rows),
    )
