"""What lmms-eval and VLMEvalKit write, as columns of the tables in percent.

Where a number is, and what makes a percentage of it, the catalogue says for each data set: both
harnesses write shares of 1 for some and percent or points for others, and 0.36 may be either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omnimerge.bench.published.schema import Evaluation, HarnessFile, HarnessMetric
from omnimerge.bench.published.tables import catalogue
from omnimerge.errors import OmnimergeError

Warn = Callable[[str], None]
Rows = list[dict[str, Any]]
"""A file of VLMEvalKit: each row by column; the first column is what the row is about."""


class ResultsError(OmnimergeError):
    """A file of results is wrong."""


def number(value: Any, where: str) -> float:
    """Read a number.

    Args:
        value: text or a number.
        where: it is from.

    Returns:
        The number.

    Raises:
        ResultsError: if it is none, or not finite.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not math.isfinite(found):
        raise ResultsError(f"{where}: {value!r} is no number")
    return found


def lmms_eval(content: Mapping[str, Any], path: Path, warn: Warn | None) -> dict[str, float]:
    """Take what the tables have from lmms-eval's results.

    Args:
        content: of the file.
        path: the file.
        warn: told of tasks that are known but have not their metrics; None: they are refused.

    Returns:
        Column to value.

    Raises:
        ResultsError: if there is nothing that the tables have.
    """
    found, lacking = {}, []
    for entry in catalogue().evaluations:
        asked = entry.lmms_eval
        scores = content["results"].get(asked.task) if asked else None
        if asked is None or not isinstance(scores, Mapping):
            continue
        # Metrics are named metric,filter.
        plain = {str(key).partition(",")[0]: value for key, value in scores.items()}
        parts = _parts(asked, plain)
        if isinstance(parts, str):
            has = ", ".join(key for key in plain if key != "alias") or "nothing"
            lacking.append(f"{path}: {asked.task} has no {parts}, only {has}; no {entry.column}")
        else:
            where = f"{path}: {asked.task}"
            total = sum(number(part, where) for part in parts)
            found[entry.column] = _percent(total, asked.factor, where)
    if lacking and (warn is None or not found):
        raise ResultsError(lacking[0])
    if not found:
        raise ResultsError(
            f"{path} holds none of the tasks that `omnimerge bench published evaluations` lists"
        )
    if warn is not None:
        for each in lacking:
            warn(each)
    return found


def _parts(asked: HarnessMetric, plain: Mapping[str, Any]) -> list[Any] | str:
    """Return the values to add up, or the first metric that is missing."""
    parts = []
    for metric in asked.metrics:
        value = plain.get(metric, plain.get(asked.older.get(metric, metric)))
        if value is None:
            return metric
        parts.append(value)
    return parts


def evaluated(content: Mapping[str, Any]) -> str:
    """Tell which model lmms-eval asked.

    Args:
        content: of its file of results.

    Returns:
        The last part of the model's path; empty if the file does not say.
    """
    config = content.get("config")
    told = str(config.get("model_args", "")) if isinstance(config, Mapping) else ""
    match = re.search(r"pretrained=([^,]+)", told)
    name = match.group(1) if match else str(content.get("model_name", ""))
    return name.rstrip("/").rpartition("/")[2]


def of_vlmevalkit(path: Path) -> Evaluation | None:
    """Find the data set that a file of VLMEvalKit is about.

    Args:
        path: the file; VLMEvalKit names it MODEL_DATASET_acc.csv, or _score.csv, or _score.json.

    Returns:
        What the catalogue has of it; None for another file.
    """
    found = []
    for entry in catalogue().evaluations:
        if entry.vlmevalkit:
            dataset = re.escape(entry.vlmevalkit.dataset)
            if match := re.search(rf"(^|.*_){dataset}(_[^_]+)*_(acc|score)\.", path.name):
                found.append((len(match[1]), entry))
    # A model's name may have a data set's name in it; the data set's own comes last.
    return max(found, key=lambda pair: pair[0])[1] if found else None


def vlmevalkit(rows: Rows, entry: Evaluation, path: Path) -> dict[str, float]:
    """Take the one number that the tables have from a file of VLMEvalKit.

    Args:
        rows: of the file.
        entry: what it is about.
        path: the file.

    Returns:
        Column to value.

    Raises:
        ResultsError: if rows or columns are missing.
    """
    asked = entry.vlmevalkit
    assert asked is not None
    values = []
    for row in _rows(rows, asked, path):
        if missing := [column for column in asked.columns if row.get(column) in (None, "")]:
            has = ", ".join(map(str, row))
            raise ResultsError(f"{path} has no column {missing[0]!r}; it has: {has}")
        values.append(sum(number(row[column], str(path)) for column in asked.columns))
    return {entry.column: _percent(sum(values) / len(values), asked.factor, str(path))}


def _rows(rows: Rows, asked: HarnessFile, path: Path) -> Sequence[dict[str, Any]]:
    """Return the rows that count."""
    if not asked.rows:
        if len(rows) != 1:
            raise ResultsError(f"{path} has {len(rows)} rows of numbers instead of one")
        return rows
    named = {str(next(iter(row.values()), "")).strip().lower(): row for row in rows}
    if missing := [name for name in asked.rows if name not in named]:
        has = ", ".join(named) or "none"
        raise ResultsError(f"{path} has no row {missing[0]!r}; it has: {has}")
    return [named[name] for name in asked.rows]


def _percent(value: float, factor: float, where: str) -> float:
    """Make a percentage; one that cannot be was written in another unit than the catalogue says."""
    percent = value * factor
    if not 0 <= percent <= 100 + 1e-9:
        raise ResultsError(
            f"{where}: {value:g} is {percent:g} % by the harness's unit; write method,column,value"
        )
    return percent
