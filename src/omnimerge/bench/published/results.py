"""A user's own numbers: records of method, column and value, or what a harness writes.

Read are

* JSON: a list of ``{"method": …, "column": …, "value": …}``, or an object with such a list as
  ``results``;
* CSV with the columns ``method``, ``column`` and ``value``;
* lmms-eval's ``…results.json``;
* VLMEvalKit's ``MODEL_DATASET_acc.csv``, ``MODEL_DATASET_score.csv`` and, of OCRBench,
  ``MODEL_DATASET_score.json``; of MathVista and MATH-Vision the geometry subsets, as OptMerge's
  tables have them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omnimerge.bench.published import harnesses
from omnimerge.bench.published.harnesses import ResultsError, Warn, number
from omnimerge.bench.published.tables import catalogue, plain

Results = dict[str, dict[str, float]]
"""Method -> column -> value."""

_KEYS = {"method", "column", "value"}


def read_results(path: Path, method: str | None = None, *, warn: Warn | None = None) -> Results:
    """Read a file of results.

    Args:
        path: the file.
        method: a name for what was evaluated; needed for VLMEvalKit's files, and otherwise only
            to replace the name in the file.
        warn: told what had to be left out, in one line; None: it is an error.

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
    found = _read_json(text, path, warn) if path.suffix == ".json" else _read_csv(text, path)
    if method is not None:
        if len(found) > 1:
            raise ResultsError(f"{path} holds {len(found)} methods; leave {method}= out")
        found = {method: next(iter(found.values()))}
    if "" in found:
        raise ResultsError(f"{path} does not say what was evaluated; write METHOD={path}")
    return found


def _read_json(text: str, path: Path, warn: Warn | None) -> Results:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON: {error}") from error
    records = content.get("results") if isinstance(content, dict) else content
    if isinstance(content, dict) and isinstance(records, dict):
        return {harnesses.evaluated(content): harnesses.lmms_eval(content, path, warn)}
    if isinstance(content, dict) and records is None and (entry := harnesses.of_vlmevalkit(path)):
        return {"": harnesses.vlmevalkit([content], entry, path)}
    if not isinstance(records, list):
        raise ResultsError(f"{path} holds no list of records with method, column and value")
    return _collect(records, path)


def _read_csv(text: str, path: Path) -> Results:
    lines = [line for line in csv.reader(text.splitlines()) if line]
    if not lines:
        raise ResultsError(f"{path} is empty")
    header = [cell.strip() for cell in lines[0]]
    if {cell.lower() for cell in header} == _KEYS:
        keys = [cell.lower() for cell in header]
        return _collect((dict(zip(keys, line, strict=False)) for line in lines[1:]), path)
    if entry := harnesses.of_vlmevalkit(path):
        rows = [dict(zip(header, line, strict=False)) for line in lines[1:]]
        return {"": harnesses.vlmevalkit(rows, entry, path)}
    raise ResultsError(
        f"{path}: the first line must be method,column,value; or the file VLMEvalKit's "
        "MODEL_DATASET_acc.csv of a data set that `omnimerge bench published evaluations` lists"
    )


def _collect(records: Iterable[Any], path: Path) -> Results:
    found: Results = {}
    for count, record in enumerate(records, start=1):
        if not isinstance(record, Mapping) or set(record) != _KEYS:
            raise ResultsError(f"{path}: record {count} must have method, column and value alone")
        row = found.setdefault(str(record["method"]).strip(), {})
        column = str(record["column"]).strip()
        if column in row:
            raise ResultsError(f"{path}: record {count}: {column} is given twice for one method")
        row[column] = number(record["value"], f"{path}: record {count}")
    if not found:
        raise ResultsError(f"{path} holds no results")
    _refuse_shares(found, path)
    return found


def _refuse_shares(found: Results, path: Path) -> None:
    """Refuse shares of 1 in records, whose unit nobody tells; of the harnesses it is known."""
    scores = {plain(name) for entry in catalogue().evaluations for name in entry.names}
    scores |= {plain(name) for name in ("Avg", "SUM")}
    values = [v for row in found.values() for name, v in row.items() if plain(name) in scores]
    if values and max(map(abs, values)) <= 1:
        raise ResultsError(
            f"{path}: all scores are at most 1; the tables are in percent: multiply by 100"
        )
