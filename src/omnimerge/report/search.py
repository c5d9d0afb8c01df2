"""The report of a search: one self-contained HTML page, from ``search.json`` and the answers."""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup

from omnimerge.errors import SearchError
from omnimerge.report._page import template
from omnimerge.report.answers import PAGE_LIMIT, TEXT_LIMIT, Answers
from omnimerge.report.plots import WIDTHS, draw_curve, heat_map, noise_line
from omnimerge.search import TIE_RULE, read_result
from omnimerge.search.scoring import TOKENS
from omnimerge.search.store import write_atomically
from omnimerge.search.study import CHOSEN_NAME, MAPPING_NAME, REPORT_NAME

if TYPE_CHECKING:
    from omnimerge.search import SearchResult
    from omnimerge.search.result import Point, PointDiagnostics

SCORES = {
    "unanimity": "prompts whose answer differs from that at a neighbouring point",
    "pairwise": "answers that differ from those at the neighbouring points, added up",
    "backward": "prompts whose answer differs from that at the previous point",
}
"""Criterion -> what its score counts, where answers are compared exactly."""

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass
class Part:
    """A row of the mapping: a tower, the embedding, all layers.

    Attributes:
        label: its name.
        target: state -> tensors of the target.
        donor: state -> tensors of the donor.
    """

    label: str
    target: Counter[str]
    donor: Counter[str]


def write_search_report(folder: Path, file: Path | None = None) -> Path:
    """Write a search as one HTML page. No label is read, no network is used.

    Args:
        folder: a folder with ``search.json``, or that file.
        file: the page; default: ``report.html`` beside ``search.json``.

    Returns:
        The page.

    Raises:
        SearchError: if the folder holds no search result, or the page cannot be written.
    """
    result = read_result(folder)
    _check(folder, result)
    folder = folder if folder.is_dir() else folder.parent
    page = render_search(folder, result)
    # A model may answer with half a character, which no file can hold.
    page = page.encode("utf-8", "backslashreplace").decode("utf-8")
    return write_atomically(folder / REPORT_NAME if file is None else file, page)


def render_search(folder: Path, result: SearchResult) -> str:
    """Render the page of a search.

    Args:
        folder: where the answers, the chosen recipe and the mapping are, as far as they are.
        result: what the search found.

    Returns:
        HTML.
    """
    followed = result.distance == TOKENS
    answers = Answers(folder, result, read=not followed)
    recipe, chosen_recipe = _recipe(folder, result)
    mapping, problem = _mapping(folder)
    # Our own files; the rule of the page's contents names the script by its hash.
    style, script = ((_TEMPLATES / f"search.{kind}").read_text("utf-8") for kind in ("css", "js"))
    names = _names(result.recipe)
    packed = answers.pack()
    return template("search.html", readable=_readable, number=_number, share=_share).render(
        result=result,
        names=names,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        tie_rule=TIE_RULE,
        score_is=_score_is(result),
        accuracy=_accuracies(result),
        curves={name: draw_curve(result, width) for name, width in WIDTHS.items()}
        if len(result.axes) == 1
        else {},
        maps=_maps(result),
        noise=noise_line(result),
        score=next(point.score for point in result.points if point.values == result.selected),
        seen=next((d for d in result.diagnostics.points if d.values == result.selected), None),
        rows=_rows(result),
        axis_title=_axis_title(result),
        answers=answers,
        followed=followed,
        table=answers.table(),
        packed=packed,
        packed_json=Markup(packed.text),  # holds no character that could end its element
        limits={"page": PAGE_LIMIT, "text": TEXT_LIMIT},
        recipe=recipe,
        chosen_recipe=chosen_recipe,
        mapping=mapping,
        mapping_problem=problem,
    )


def _check(folder: Path, result: SearchResult) -> None:
    """Refuse a result that fits the schema and yet contradicts itself."""
    names = {axis.name for axis in result.axes}
    points = [point.values for point in result.points]
    if not names or any(point.keys() != names for point in points):
        problem = "a point has other axes than the search"
    elif result.selected not in points:
        problem = f"the chosen point, {result.label}, is none of its points"
    else:
        return
    raise SearchError(f"{folder} holds no search result: {problem}; run the search again")


def mapping_summary(alignment: Mapping[str, Any]) -> dict[str, Any]:
    """Count an alignment by part and by reason.

    Args:
        alignment: what `Alignment.to_dict` returns.

    Returns:
        The sides' names, one `Part` per row, and the reasons of what is kept and unused.
    """
    from omnimerge.report.mapping import by_reason, count_parts, display_name
    from omnimerge.report.picture import LAYERS, SIDES, label, order, summed

    rows: dict[str, dict[str, Counter[str]]] = {}
    counts = {side: count_parts(alignment, side) for side in SIDES}
    layers = {part for side in SIDES for part in counts[side] if part.startswith(f"{LAYERS}.")}
    for part in sorted({part for side in SIDES for part in counts[side]}, key=order):
        name = f"{len(layers)} layers" if part in layers else label(part)
        row = rows.setdefault(name, {side: Counter() for side in SIDES})
        for side in SIDES:
            row[side] += summed(counts[side].get(part, {}).values())
    parts = [Part(name, row["target"], row["donor"]) for name, row in rows.items()]
    return {
        "names": {side: display_name(str(alignment[side]["path"])) for side in SIDES},
        "parts": parts,
        "rearranged": sum(part.target["rearranged"] for part in parts),
        "reasons": {state: by_reason(alignment, state) for state in ("kept", "unused")},
        "heterogeneity": [(str(e["kind"]), str(e["detail"])) for e in alignment["heterogeneity"]],
        "notes": [str(note) for note in alignment["notes"]],
    }


def _mapping(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The summary of the search's mapping, or why there is none."""
    file = folder / MAPPING_NAME
    if not file.is_file():
        return None, f"{MAPPING_NAME} is not there: the search that wrote this folder kept none."
    try:
        return mapping_summary(json.loads(file.read_text(encoding="utf-8"))), ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None, f"{MAPPING_NAME} holds no mapping that can be read."


def _recipe(folder: Path, result: SearchResult) -> tuple[str, bool]:
    """The recipe as text, and whether it is the one with the choice."""
    try:
        return (folder / CHOSEN_NAME).read_text(encoding="utf-8"), True
    except (OSError, UnicodeDecodeError):
        return yaml.safe_dump(result.recipe, sort_keys=False, allow_unicode=True), False


def _names(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What the checkpoints of a recipe are called."""
    from omnimerge.report.mapping import display_name

    entries = recipe.get("models")
    entries = entries if isinstance(entries, list) else [entries]
    references = [e.get("adapter") or e.get("model") if isinstance(e, dict) else e for e in entries]
    target = recipe.get("target") or recipe.get("base")
    return {
        "models": " + ".join(display_name(str(each)) for each in references if each),
        "target": display_name(str(target)) if target else "",
    }


def _score_is(result: SearchResult) -> str:
    """What the score is, in words."""
    if result.distance == "exact" and result.criterion in SCORES:
        words = SCORES[result.criterion]
    else:
        words = f"{result.distance} distance between neighbouring points' answers, summed"
    return words + (", each over the step between them" if result.per_step else "")


def _accuracies(result: SearchResult) -> dict[str, Any] | None:
    """The chosen point's accuracy and the best one's; for display only."""
    known = [(p.accuracy, p) for p in result.points if p.accuracy is not None]
    if not known or result.heldout is None:
        return None
    best, where = max(known, key=lambda pair: pair[0])
    chosen = [p.accuracy for p in result.points if p.values == result.selected]
    return {
        "chosen": chosen[0] if chosen else None,
        "best": best,
        "where": where.label,
        "prompts": result.heldout.count,
    }


def _maps(result: SearchResult) -> list[Any]:
    if len(result.axes) != 2:
        return []
    labelled = any(point.accuracy is not None for point in result.points)
    return [heat_map(result, name) for name in ("score", "accuracy")[: 1 + labelled]]


def _rows(result: SearchResult) -> list[tuple[Point, PointDiagnostics | None]]:
    """The points, each with what its answers look like."""
    seen = {tuple(sorted(each.values.items())): each for each in result.diagnostics.points}
    return [(point, seen.get(tuple(sorted(point.values.items())))) for point in result.points]


def _axis_title(result: SearchResult) -> str:
    share = " (the donor's share)" if result.recipe.get("method") == "adamms" else ""
    return result.parameter + share


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"


def _share(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _readable(text: str) -> str:
    """Text whose control characters are seen instead of obeyed."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 0x20 and c not in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
        for c in text
    )  # fmt: skip
