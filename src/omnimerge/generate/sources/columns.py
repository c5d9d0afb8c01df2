"""Which column of a table, or key of a record, each field of a prompt is read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omnimerge.errors import PromptError, suggestion
from omnimerge.generate.sources.prompt import FIELDS


def check_map(columns: Mapping[str, str]) -> None:
    """Refuse a map that names a field that prompts do not have.

    Args:
        columns: field of a prompt to name in the source, such as ``{"prompt": "question"}``.

    Raises:
        PromptError: naming the field.
    """
    for field in columns:
        if field not in FIELDS:
            hint = suggestion(field, FIELDS) or f"; known: {', '.join(FIELDS)}"
            raise PromptError(f"a prompt has no field {field!r} to take from a column{hint}")


def choose(
    source: object,
    present: Sequence[str],
    columns: Mapping[str, str],
    defaults: Mapping[str, str],
    *,
    labels: bool,
) -> dict[str, str]:
    """Return the columns to read. The answers' column is among them only if `labels` are asked for.

    Args:
        source: what is read, for messages.
        present: the columns that are there.
        columns: the caller's map from field to column; these columns have to be there.
        defaults: the columns of other fields, read if they are there.
        labels: whether to read answers.

    Returns:
        Field to column.

    Raises:
        PromptError: if a mapped column, or one for the prompt, is not there.
    """
    missing = [name for name in columns.values() if name not in present]
    if missing:
        hint = suggestion(missing[0], present)
        raise PromptError(f"{source} has no column {missing[0]!r}{hint}; it has {_listed(present)}")
    taken = set(columns.values())
    chosen = {f: c for f, c in defaults.items() if c in present and c not in taken} | dict(columns)
    if "prompt" not in chosen:
        raise PromptError(
            f"{source} has no column {defaults['prompt']!r}, only {_listed(present)}; say which "
            'one holds the prompt, such as columns={"prompt": "question"}'
        )
    if not labels:
        chosen.pop("answer", None)
    return chosen


def _listed(present: Sequence[str]) -> str:
    return ", ".join(map(repr, present)) or "none"
