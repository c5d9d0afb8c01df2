"""An experiment as sections of a dashboard."""

from __future__ import annotations

from typing import Any

from omnimerge.bench.analysis_page import Section, line
from omnimerge.bench.experiments.result import Experiment


def experiment_sections(found: Experiment) -> list[Section]:
    """Return an experiment: its curves, its distributions and its table.

    Args:
        found: the experiment, means over the seeds.

    Returns:
        Sections; question and outcome are with the first.
    """
    sections: list[Section] = []
    if found.curves:
        sections.append(
            {
                "kind": "lines",
                "x": found.x,
                "y": found.y,
                "log_x": found.log_x,
                "log_y": found.log_y,
                "levels": dict(found.levels),
                "lines": [line(c.name, c.x, c.y, c.deviation) for c in found.curves],
            }
        )
    if found.shares:
        sections.append(
            {
                "kind": "histogram",
                "x": found.x,
                "y": found.y,
                "edges": list(found.edges),
                "log_x": found.edges[0] > 0,
                "digits": 3,
                "series": [{"name": n, "values": list(v)} for n, v in found.shares.items()],
            }
        )
    if found.rows:
        sections.append(_experiment_table(found))
    if not sections:
        return []
    settings = ", ".join(f"{name} {value}" for name, value in found.settings.items())
    folder = f" {found.line}" if found.line else ""
    for number, section in enumerate(sections):
        of = f" ({found.paper} of the OptMerge paper)" if found.paper and not number else ""
        section["title"] = found.title + (of if not number else ", in numbers")
    sections[0]["text"] = [found.question]
    last = sections[-1]
    last["notes"] = [*found.outcome, *([f"Settings: {settings}."] if settings else [])]
    last["command"] = f"omnimerge bench experiment {found.name}{folder and ' DIR'}"
    return sections


def _experiment_table(found: Experiment) -> Section:
    columns = [[row.values[i] for row in found.rows] for i in range(len(found.columns))]
    tops = [max((v for v in values if v is not None), default=None) for values in columns]
    scored = found.digits == 1  # tables of scores have one decimal, and a best row

    def cell(row: Any, i: int) -> dict[str, Any]:
        deviation = row.deviations[i] if row.deviations else None
        value = row.values[i]
        ranked = scored and len(found.rows) > 1 and found.columns[i] != "λ"
        best = ranked and value is not None and value == tops[i]
        return {"value": value, "deviation": deviation, "best": best}

    return {
        "kind": "table",
        "head": found.head,
        "columns": [{"name": name, "digits": found.digits} for name in found.columns],
        "rows": [
            {"name": row.name, "cells": [cell(row, i) for i in range(len(found.columns))]}
            for row in found.rows
        ],
    }
