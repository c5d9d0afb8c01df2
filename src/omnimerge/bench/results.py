"""The schema of ``build.json``, of each row, and of ``results.json``."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from omnimerge.bench.line import BenchError

BUILD_NAME = "build.json"
ROWS_NAME = "results"
RESULTS_NAME = "results.json"
VERSIONS_NAME = "versions.json"

Kind = Literal["base", "expert", "reference", "method", "search", "refused"]
"""`search`: the scale of a method chosen without labels. `refused`: a method that cannot be run."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Environment(_Strict):
    """Where something was run.

    Attributes:
        command: the command line.
        versions: package -> version; Python too.
        machine: architecture of the processor.
        cores: how many processors there are.
    """

    command: str
    versions: dict[str, str]
    machine: str
    cores: int


class Build(_Strict):
    """The mark of a complete build of one seed.

    Attributes:
        line: name of the line.
        preset: name of the preset.
        settings: what the preset held.
        seed: the seed.
        seconds: how long it took, interrupted calls included.
        environment: where.
    """

    line: str
    preset: str
    settings: dict[str, Any] = {}
    seed: int
    seconds: float
    environment: Environment


class Point(_Strict):
    """A method at some parameters, on the validation split.

    Attributes:
        parameters: the method's keywords.
        scores: column -> share of right answers.
        changed: the criterion of the choice without labels, smaller is better; None at the ends.
    """

    parameters: dict[str, Any]
    scores: dict[str, float]
    changed: float | None = None


class Row(_Strict):
    """One row of the table, for one seed.

    Attributes:
        name: of the model or method.
        kind: what it is.
        scores: column -> share of right answers on the test split; None for a refused method.
        parameters: the chosen keywords of a method.
        points: what they were chosen from.
        asked: the values that were asked for, so that another request is noticed.
        took: seconds that the row took in all, merging and answering.
        seconds: time of the merge to disk.
        peak_bytes: memory that the merge to disk took on top of the idle process, where known.
        reason: why a method was refused.
    """

    name: str
    kind: Kind
    scores: dict[str, float] | None = None
    parameters: dict[str, Any] = {}
    points: tuple[Point, ...] = ()
    asked: tuple[float, ...] = ()
    took: float = 0.0
    seconds: float | None = None
    peak_bytes: int | None = None
    reason: str = ""

    @property
    def average(self) -> float | None:
        """The plain mean of the columns."""
        return mean(self.scores.values()) if self.scores else None


class Results(_Strict):
    """All rows of one seed.

    Attributes:
        line: name of the line.
        preset: name of the preset.
        seed: the seed.
        columns: the tasks, in order.
        rows: the rows.
        environment: where it was run.
        build: where it was built.
    """

    line: str
    preset: str
    seed: int
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    environment: Environment
    build: Environment


def mean(values: Any) -> float:
    """Average numbers.

    Args:
        values: at least one.

    Returns:
        Their mean.
    """
    found = list(values)
    return float(sum(found) / len(found))


def environment(command: Sequence[str]) -> Environment:
    """Describe this machine and what is installed.

    Args:
        command: the command line.

    Returns:
        The description.
    """
    versions = {"python": platform.python_version()}
    for package in ("omnimerge", "torch", "transformers", "peft", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Environment(
        command=" ".join(command),
        versions=versions,
        machine=platform.machine(),
        cores=os.cpu_count() or 1,
    )


_Read = TypeVar("_Read", bound=BaseModel)


def read(schema: type[_Read], path: Path) -> _Read:
    """Read a file of this room.

    Args:
        schema: what it holds.
        path: the file.

    Returns:
        Its content.

    Raises:
        BenchError: if it is missing or does not fit the schema.
    """
    try:
        return schema.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BenchError(f"{path}: no such file") from None
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        first = str(error).splitlines()
        raise BenchError(
            f"{path} is no {schema.__name__.lower()} file: {'; '.join(first[:3])}"
        ) from None


def write(value: BaseModel, path: Path) -> None:
    """Write a file of this room, whole or not at all.

    Args:
        value: what to write.
        path: the file.
    """
    from omnimerge.search.store import write_atomically

    write_atomically(path, value.model_dump_json(indent=1) + "\n")
