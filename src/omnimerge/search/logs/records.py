"""Rows of named values: VLMEvalKit's predictions, and JSON lines of ids and responses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omnimerge.errors import SearchError
from omnimerge.search.logs import lmms_eval
from omnimerge.search.logs.log import Row, as_text

VLMEVALKIT = "VLMEvalKit"
LINES = "JSON lines"

# (who writes it, id, answer, prompt); the columns of labels and scores are in no list
_FORMS = (
    (VLMEVALKIT, "index", "prediction", "question"),
    (LINES, "id", "response", "prompt"),
)
_KNOWN = (
    "'index' with 'prediction' (VLMEvalKit), 'doc_id' with 'resps' (lmms-eval), "
    "or 'id' with 'response'"
)


def kind_of(path: Path, names: Iterable[str]) -> str:
    """Tell who wrote rows from the names of their values.

    Args:
        path: the file, for messages.
        names: the names.

    Returns:
        The kind.

    Raises:
        SearchError: if there is no id, or no answer.
    """
    found = dict.fromkeys(names)
    if lmms_eval.is_sample(found):
        return lmms_eval.KIND
    for kind, id_, answer, _ in _FORMS:
        if id_ in found and answer in found:
            return kind
    shown = ", ".join(map(repr, list(found)[:8])) or "nothing"
    raise SearchError(f"{path}: no ids with answers: it has {shown}; needed: {_KNOWN}")


def parse_rows(
    path: Path, kind: str, rows: Iterable[tuple[str, Mapping[str, Any]]], filtered: bool
) -> Iterator[Row]:
    """Take the id, the answer and the prompt out of rows.

    Args:
        path: the file, for messages.
        kind: who wrote it.
        rows: (place in the file, name -> value).
        filtered: as for `lmms_eval.parse_sample`.

    Yields:
        The rows.

    Raises:
        SearchError: if a row has no id or no answer.
    """
    if filtered and kind != lmms_eval.KIND:
        raise SearchError(f"{path}: {kind} has no filtered answers; leave --filtered out")
    for where, raw in rows:
        if kind == lmms_eval.KIND:
            yield lmms_eval.parse_sample(path, raw, where, filtered)
        else:
            yield _parse(path, kind, raw, where)


def _parse(path: Path, kind: str, raw: Mapping[str, Any], where: str) -> Row:
    id_, answer, prompt = next(form[1:] for form in _FORMS if form[0] == kind)
    if as_text(raw.get(id_)) == "" or answer not in raw:
        missing = answer if answer not in raw else id_
        raise SearchError(f"{path}, {where}: no {missing!r}; complete the row or delete it")
    name, asked = as_text(raw[id_]), raw.get(prompt)
    if kind == VLMEVALKIT and re.fullmatch(r"\d+\.0", name):
        name = name[:-2]  # one missing index makes pandas write all of them with a fraction
    return Row(name, as_text(raw[answer]), where, (asked if isinstance(asked, str) else None, None))
