"""A user's own numbers: records of method, column and value, or what a harness writes.

Read are

* JSON: a list of ``{"method": …, "column": …, "value": …}``, or an object with such a list as
  ``results``;
* CSV with the columns ``method``, ``column`` and ``value``;
* lmms-eval's ``…results.json``;
* VLMEvalKit's ``MODEL_DATASET_acc.csv`` and ``MODEL_DATASET_score.csv``; of MathVista and
  MATH-Vision the geometry subsets, as OptMerge's tables have them.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omnimerge.bench.published.schema import Evaluation
from omnimerge.bench.published.tables import catalogue
from omnimerge.errors import OmnimergeError

Results = dict[str, dict[str, float]]
"""Method -> column -> value."""

_KEYS = {"method", "column", "value"}

# The rows that OptMerge averages; every one counts the same.
_GEOMETRY = {
    "MathVista": ("geometry reasoning", "algebraic reasoning", "geometry problem solving"),
    "MATH-Vision": (
        "metric geometry - angle",
        "metric geometry - area",
        "metric geometry - length",
        "solid geometry",
    ),
}


class ResultsError(OmnimergeError):
    """A file of results is wrong."""


def read_results(path: Path, method: str | None = None) -> Results:
    """Read a file of results.

    Args:
        path: the file.
        method: a name for what was evaluated; needed for VLMEvalKit's files, and otherwise only
            to replace the name in the file.

    Returns:
        Method to column to value, in the unit of the tables.

    Raises:
        ResultsError: if the file cannot be read, or holds no results; with the reason.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ResultsError(f"cannot read {path}: it is not text in UTF-8") from error
    found = _read_json(text, path) if path.suffix == ".json" else _read_csv(text, path)
    if method is not None:
        if len(found) > 1:
            raise ResultsError(f"{path} holds {len(found)} methods; leave {method}= out")
        found = {method: next(iter(found.values()))}
    if "" in found:
        raise ResultsError(f"{path} does not say what was evaluated; write METHOD={path}")
    return found


def _read_json(text: str, path: Path) -> Results:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON: {error}") from error
    records = content.get("results") if isinstance(content, dict) else content
    if isinstance(content, dict) and isinstance(records, dict):
        return _lmms_eval(content, path)
    if not isinstance(records, list):
        raise ResultsError(f"{path} holds no list of records with method, column and value")
    return _collect(records, path)


def _read_csv(text: str, path: Path) -> Results:
    rows = list(csv.reader(text.splitlines()))
    if not rows:
        raise ResultsError(f"{path} is empty")
    header = [cell.strip().lower() for cell in rows[0]]
    if set(header) == _KEYS:
        records = (dict(zip(header, row, strict=False)) for row in rows[1:] if row)
        return _collect(records, path)
    for entry in catalogue().evaluations:
        if entry.vlmevalkit and re.search(rf"_{re.escape(entry.vlmevalkit)}(_|\.)", path.name):
            return {"": {entry.column: _vlmevalkit(rows, entry, path)}}
    raise ResultsError(
        f"{path}: the first line must be method,column,value; or the file VLMEvalKit's "
        "MODEL_DATASET_acc.csv of a data set that `omnimerge bench published evaluations` lists"
    )


def _collect(records: Iterable[Any], path: Path) -> Results:
    found: Results = {}
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping) or set(record) != _KEYS:
            raise ResultsError(f"{path}: record {number} must have method, column and value alone")
        row = found.setdefault(str(record["method"]).strip(), {})
        column = str(record["column"]).strip()
        if column in row:
            raise ResultsError(f"{path}: record {number}: {column} is given twice for one method")
        row[column] = _number(record["value"], f"{path}: record {number}")
    if not found:
        raise ResultsError(f"{path} holds no results")
    return found


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ResultsError(f"{where}: {value!r} is no number")
    return number


def _lmms_eval(content: Mapping[str, Any], path: Path) -> Results:
    """Take what the tables have from lmms-eval's results, whose metrics are named metric,filter."""
    found = {}
    for entry in catalogue().evaluations:
        if entry.lmms_eval is None:
            continue
        scores = content["results"].get(entry.lmms_eval.task)
        if not isinstance(scores, Mapping):
            continue
        plain = {str(key).partition(",")[0]: value for key, value in scores.items()}
        parts = [plain.get(metric) for metric in entry.lmms_eval.metrics]
        if None not in parts:
            where = f"{path}: {entry.lmms_eval.task}"
            total = sum(_number(part, where) for part in parts)
            found[entry.column] = total * entry.lmms_eval.factor
    if not found:
        raise ResultsError(f"{path} holds none of the tasks that `… published evaluations` lists")
    return {_evaluated(content): found}


def _evaluated(content: Mapping[str, Any]) -> str:
    """Return the last part of the path of the model that lmms-eval asked."""
    config = content.get("config")
    told = str(config.get("model_args", "")) if isinstance(config, Mapping) else ""
    match = re.search(r"pretrained=([^,]+)", told)
    name = match.group(1) if match else str(content.get("model_name", ""))
    return name.rstrip("/").rpartition("/")[2]


def _vlmevalkit(rows: list[list[str]], entry: Evaluation, path: Path) -> float:
    if subjects := _GEOMETRY.get(entry.column):
        found = {row[0].strip().lower(): row[-1] for row in rows[1:] if row}
        if missing := [subject for subject in subjects if subject not in found]:
            raise ResultsError(f"{path} has no row {missing[0]!r}")
        return sum(_number(found[subject], str(path)) for subject in subjects) / len(subjects)
    overall = [number for number, name in enumerate(rows[0]) if name.strip() == "Overall"]
    if len(rows) != 2 or not overall:
        raise ResultsError(f"{path} has not one line with a column Overall")
    value = _number(rows[1][overall[0]], str(path))
    return 100 * value if value <= 1 else value
