"""The answers of one file, by id."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimerge.errors import SearchError


@dataclass(frozen=True, slots=True)
class Row:
    """One logged answer.

    Attributes:
        id: which prompt it answers.
        answer: its text.
        where: the place in the file, for messages.
        asked: what tells the prompt, as far as the log has it: its text, and a hash of its source.
    """

    id: str
    answer: str
    where: str
    asked: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True)
class Log:
    """The answers of one coefficient.

    Attributes:
        path: what was asked for: a file, or a folder of several.
        kind: who wrote it, for people.
        answers: id -> answer, in the order of the file.
        asked: id -> what tells the prompt; see `Row`.
        notes: what the user should know of how it was read.
    """

    path: Path
    kind: str
    answers: Mapping[str, str]
    asked: Mapping[str, tuple[str | None, str | None]]
    notes: tuple[str, ...] = ()


def collect(path: Path, kind: str, rows: Iterable[Row], notes: Iterable[str] = ()) -> Log:
    """Put rows together by id; the same answer twice is one answer.

    Args:
        path: the file.
        kind: who wrote it.
        rows: its rows.
        notes: what to tell the user.

    Returns:
        The log.

    Raises:
        SearchError: if an id has two answers, or there is no row.
    """
    found: dict[str, Row] = {}
    repeated = 0
    for row in rows:
        first = found.setdefault(row.id, row)
        repeated += first is not row
        if first.answer != row.answer or first.asked != row.asked:
            what = "answers" if first.answer != row.answer else "prompts"
            raise SearchError(
                f"{path}: id {row.id!r} has two {what} ({first.where} and {row.where}): two runs "
                "were appended, or the task has several filters; keep the rows of one"
            )
    if not found:
        raise SearchError(f"{path} holds no answer; was the run stopped? Run it again")
    told = [*notes, *_about(found.values(), repeated)]
    return Log(
        path,
        kind,
        {row.id: row.answer for row in found.values()},
        {row.id: row.asked for row in found.values()},
        tuple(f"{path}: {note}" for note in told),
    )


def as_text(value: Any) -> str:
    """Return a logged value as text: nothing is ``""``, text is itself, a number as it is written.

    Args:
        value: from JSON or a spreadsheet cell.

    Returns:
        The text.
    """
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


_FAILED = "Failed to obtain answer"  # what VLMEvalKit writes where the model raised an error


def _about(rows: Iterable[Row], repeated: int) -> list[str]:
    notes = []
    if repeated:
        notes.append(f"{repeated} rows repeat another with the same answer, and count once")
    if failed := sum(row.answer.startswith(_FAILED) for row in rows):
        notes.append(f"{failed} answers say '{_FAILED}': there the model gave none")
    return notes
