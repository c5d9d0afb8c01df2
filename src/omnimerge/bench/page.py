"""Results of the benchmark as a dashboard: plain data, which `omnimerge.report` turns into HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omnimerge.bench.analysis import Analysis
from omnimerge.bench.analysis_page import Section, analysis_sections, line
from omnimerge.bench.experiments.page import experiment_sections
from omnimerge.bench.experiments.result import Experiment

Kind = Literal["base", "expert", "merged", "search", "reference"]
"""`search`: a merge whose scale was chosen without labels; only `merged` is ranked."""

_INTRO = (
    "Miniature models of real architectures, trained and merged by seeded scripts. Scores are "
    "shares of right answers on questions that neither training nor the choice of a scale has seen."
)
_RIGHT = "share of right answers, %"
_UNRANKED = ", but for those with the scale by search"


@dataclass(frozen=True)
class Scored:
    """One row of a line's table, over all seeds.

    Attributes:
        name: of the row.
        kind: what it is.
        scores: share of right answers by column, in [0, 1]; None where there is none.
        deviations: of the scores over the seeds; None for one seed.
        average: mean of the columns.
        average_deviation: of the average over the seeds.
        gain: the average less the base's, seed by seed; None where there is none.
        gain_deviation: of the gain over the seeds.
        scale: what was chosen, as text.
        scale_mean: of what was chosen, over the seeds; None where nothing was.
        seconds: that the merge took.
        seconds_deviation: over the seeds.
        memory: bytes at the merge's peak.
    """

    name: str
    kind: Kind
    scores: tuple[float | None, ...]
    deviations: tuple[float | None, ...]
    average: float | None
    average_deviation: float | None = None
    gain: float | None = None
    gain_deviation: float | None = None
    scale: str = ""
    scale_mean: float | None = None
    seconds: float | None = None
    seconds_deviation: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class ScaleCurve:
    """What a method's average on the validation split is over its scale.

    Attributes:
        name: of the method.
        scales: increasing.
        averages: in [0, 1].
        deviations: over the seeds; empty for one seed.
    """

    name: str
    scales: tuple[float, ...]
    averages: tuple[float, ...]
    deviations: tuple[float, ...] = ()


@dataclass(frozen=True)
class Board:
    """Everything that is known of one line and preset.

    Attributes:
        line: its name; empty: recipes of one's own.
        preset: of the line.
        about: what it is, in one line.
        columns: the tasks.
        rows: the models.
        seeds: how many.
        command: that made the numbers.
        curves: averages over scales.
        analyses: of the experts' task vectors.
        experiments: means over the seeds.
        notes: remarks.
    """

    line: str = ""
    preset: str = ""
    about: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[Scored, ...] = ()
    seeds: int = 1
    command: str = ""
    curves: tuple[ScaleCurve, ...] = ()
    analyses: tuple[Analysis, ...] = ()
    experiments: tuple[Experiment, ...] = ()
    notes: tuple[str, ...] = ()


def dashboard(boards: Sequence[Board], *, title: str = "", version: str = "") -> dict[str, Any]:
    """Lay the benchmark out.

    Args:
        boards: the lines.
        title: of the page.
        version: of omnimerge.

    Returns:
        A dashboard as `omnimerge.report.dashboard_schema` describes it.
    """
    names = board_names(boards)
    named = list(zip(names, boards, strict=True))
    scored = any(board.rows for board in boards)
    return {
        "title": title
        or (f"Benchmark of merging methods: {', '.join(names)}" if scored else "Task vectors"),
        "eyebrow": "omnimerge · benchmark" + (f" · {version}" if version else ""),
        "intro": [_INTRO] if scored else [],
        "facts": [fact for name, board in named for fact in _facts(name, board, len(boards) == 1)],
        "sections": [section for name, board in named for section in _sections(name, board)],
    }


def board_names(boards: Sequence[Board]) -> list[str]:
    """Name boards after their lines, and presets where a line has several.

    Args:
        boards: all that are shown together.

    Returns:
        One name per board.
    """
    several = Counter(board.line for board in boards)
    return [
        ", ".join(filter(None, (board.line, board.preset if several[board.line] > 1 else "")))
        or "Task vectors"
        for board in boards
    ]


def _sections(name: str, board: Board) -> list[Section]:
    found: list[Section] = []
    if board.rows:
        found += [score_table(board), average_bars(board)]
        found += [radars(board)] if len(board.columns) >= 3 else []
    if board.curves:
        found.append(scale_lines(board))
    for analysis in board.analyses[:1]:
        found += analysis_sections(analysis)
    for experiment in board.experiments:
        found += experiment_sections(experiment)
    if board.analyses[1:] and found:
        found[-1].setdefault("notes", []).append(
            f"Task vectors are those of the first of {len(board.analyses)} analyses."
        )
    return [{**section, "group": name} for section in found]


def _facts(line: str, board: Board, alone: bool) -> list[dict[str, str]]:
    merged = [row for row in board.rows if row.kind == "merged" and row.average is not None]
    if not merged:
        return []
    best = max(merged, key=lambda row: row.average or 0.0)
    of_line = "" if alone else f"{line}: "
    found = [{"name": f"{of_line}best merge", "value": _percent(best), "detail": best.name}]
    for kind, name in (("base", "base"), ("expert", "best expert"), ("reference", "reference")):
        rows = [row for row in board.rows if row.kind == kind and row.average is not None]
        if rows:
            top = max(rows, key=lambda row: row.average or 0.0)
            detail = top.name if kind != "base" else ""
            found.append({"name": of_line + name, "value": _percent(top), "detail": detail})
    return found


def _percent(row: Scored) -> str:
    return "" if row.average is None else f"{100 * row.average:.1f} %"


def score_table(board: Board) -> Section:
    """Return the table of a line: rows by kind, the best merge of each column marked.

    Args:
        board: the line.

    Returns:
        A section.
    """
    merged = [row for row in board.rows if row.kind == "merged"]
    tops = [_top([row.scores[i] for row in merged]) for i in range(len(board.columns))]
    tops.append(_top([row.average for row in merged]))
    timed = any(row.seconds is not None for row in board.rows)
    gained = any(row.gain is not None for row in board.rows)
    scaled = any(row.scale for row in board.rows)
    searched = any(row.kind == "search" for row in board.rows)

    def cells(row: Scored) -> list[dict[str, Any] | None]:
        ranked = row.kind == "merged"
        scores = (*row.scores, row.average)
        spreads = (*row.deviations, row.average_deviation)
        found: list[dict[str, Any] | None] = [
            _cell(value, deviation, best=ranked and value is not None and value == top)
            for value, deviation, top in zip(scores, spreads, tops, strict=True)
        ]
        found += [_cell(row.gain, row.gain_deviation, best=False)] if gained else []
        chosen = {"value": row.scale_mean, "text": row.scale} if row.scale else None
        found += [chosen] if scaled else []
        return found + (_cost(row) if timed else [])

    columns = [{"name": name, "unit": "%", "digits": 1} for name in board.columns]
    columns.append(
        {"name": "Average", "unit": "%", "digits": 1, "title": "plain mean of the tasks"}
    )
    if gained:
        title = "points of the average above that of the same seed's base"
        columns.append({"name": "gain", "digits": 1, "title": title})
    if scaled:
        title = (
            "scale, chosen on the validation questions: by their answers, or without (by search)"
        )
        columns.append({"name": "λ", "title": title})
    if timed:
        columns.append({"name": "time", "unit": "s", "digits": 2, "title": "of merging to disk"})
        columns.append({"name": "memory", "title": "peak while merging to disk"})
    runs = f"mean ± standard deviation of {board.seeds} seeds" if board.seeds > 1 else "one seed"
    return {
        "kind": "table",
        "title": "Scores",
        "text": [*([board.about] if board.about else []), f"In percent; {runs}."],
        "head": "model",
        "columns": columns,
        "rows": [
            {
                "name": row.name,
                "label": row.kind if row.kind not in ("merged", "search", row.name) else "",
                "cells": cells(row),
            }
            for row in board.rows
        ],
        "notes": [
            f"Green: the best merge of its column{_UNRANKED if searched else ''}.",
            *board.notes,
        ],
        "command": board.command,
    }


def _cost(row: Scored) -> list[dict[str, Any] | None]:
    seconds = {"value": row.seconds, "deviation": row.seconds_deviation}
    memory = None if row.memory is None else {"value": row.memory, "text": _size(row.memory)}
    return [None if row.seconds is None else seconds, memory]


def average_bars(board: Board) -> Section:
    """Return the averages as bars, the best first.

    Args:
        board: the line.

    Returns:
        A section.
    """
    known = [row for row in board.rows if row.average is not None]
    rows = sorted(
        (row for row in known if row.kind != "search"), key=lambda row: -(row.average or 0.0)
    )
    names = [_label(row) for row in rows]
    left_out = " Those with the scale by search are in the table." if len(rows) < len(known) else ""
    return {
        "kind": "bars",
        "title": "Average",
        "head": "model",
        "categories": names,
        "series": [
            {
                "name": "average",
                "values": [_hundred(row.average) for row in rows],
                "deviations": [_hundred(row.average_deviation) for row in rows],
            }
        ],
        "axis": f"average of {len(board.columns)} tasks, %",
        "emphasis": [name for name, row in zip(names, rows, strict=True) if row.kind == "merged"],
        "notes": [f"Bold: merges.{left_out}"],
    }


def radars(board: Board) -> Section:
    """Return one radar for each merge, with base and best expert to compare with.

    Args:
        board: the line.

    Returns:
        A section.
    """
    known = [row for row in board.rows if row.average is not None]
    experts = [row for row in known if row.kind == "expert"]
    bases = [row for row in known if row.kind == "base"]
    references = [*bases[:1]]
    if experts:
        references.append(max(experts, key=lambda row: row.average or 0.0))
    shown = [*references, *(row for row in known if row.kind in ("merged", "reference"))]
    values = [value for row in shown for value in row.scores if value is not None]
    return {
        "kind": "radar",
        "title": "By task",
        "axes": list(board.columns),
        "series": [
            {"name": _label(row), "values": [_hundred(value) for value in row.scores]}
            for row in shown
        ],
        "low": 0,
        "high": min(100.0, 10 * (int(10 * max(values, default=1.0)) + 1)),
        "unit": "%",
        "apart": True,
        "references": [_label(row) for row in references],
        "text": ["One radar per merge; dashed: " + " and ".join(map(_label, references)) + "."]
        if references
        else [],
    }


def scale_lines(board: Board) -> Section:
    """Return the average on the validation split over the scale, by method.

    Args:
        board: the line.

    Returns:
        A section.
    """
    return {
        "kind": "lines",
        "title": "Scale",
        "text": ["On the validation split, where the scale is chosen."],
        "x": "scale λ on the merged task vector",
        "y": f"average, {_RIGHT}",
        "lines": [
            line(
                curve.name,
                curve.scales,
                [100 * v for v in curve.averages],
                [100 * v for v in curve.deviations],
            )
            for curve in board.curves
        ],
        "digits": 3,
    }


def _label(row: Scored) -> str:
    return f"expert {row.name}" if row.kind == "expert" and "expert" not in row.name else row.name


def _cell(value: float | None, deviation: float | None, *, best: bool) -> dict[str, Any]:
    return {"value": _hundred(value), "deviation": _hundred(deviation), "best": best}


def _hundred(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _top(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
