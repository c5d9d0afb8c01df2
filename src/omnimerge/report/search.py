"""The report of a search: one self-contained HTML page, from ``search.json`` and the responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from omnimerge.report._page import template
from omnimerge.report.plots import search_curves
from omnimerge.search import TIE_RULE, SearchResult, read_result

REPORT_NAME = "report.html"
_SHOWN_PROMPTS = 12


def write_search_report(folder: Path) -> Path:
    """Write ``report.html`` into a search's folder. No label is read, no network is used.

    Args:
        folder: a folder with ``search.json``.

    Returns:
        The page.

    Raises:
        SearchError: if the folder holds no search result.
    """
    result = read_result(folder)
    page = template("search.html").render(
        result=result,
        tie_rule=TIE_RULE,
        curves=Markup(search_curves(result)),  # our own drawing, numbers only
        best=_best(result),
        labelled=result.heldout is not None,
        changing=_changing_answers(folder, result),
        recipe=yaml.safe_dump(result.recipe, sort_keys=False, allow_unicode=True),
    )
    file = folder / REPORT_NAME
    file.write_text(page, encoding="utf-8")
    return file


def _best(result: SearchResult) -> float | None:
    known = [(p.accuracy, -p.alpha) for p in result.points if p.accuracy is not None]
    return -max(known)[1] if known else None


def _changing_answers(folder: Path, result: SearchResult) -> list[dict[str, Any]]:
    """The first prompts whose answer is not the same everywhere, with their answers."""
    answers: dict[str, list[str]] = {}
    for point in result.points:
        lines = (folder / point.responses).read_text(encoding="utf-8").splitlines()
        for line in lines:
            entry = json.loads(line)
            answers.setdefault(str(entry["id"]), []).append(str(entry["response"]))
    changing = [
        {"id": key, "answers": texts}
        for key, texts in answers.items()
        if len({text.lower() for text in texts}) > 1
    ]
    return changing[:_SHOWN_PROMPTS]
