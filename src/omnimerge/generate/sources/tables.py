"""From the cells of one row to a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omnimerge.generate.sources.embedded import MediaFolder, UnusableError, files
from omnimerge.generate.sources.prompt import MEDIA, Prompt, is_unicode

_TEXTS = ("id", "prompt", "answer", "kind")


def prompt_of(
    cells: Mapping[str, Any], home: Path, store: MediaFolder, problems: Sequence[str] = ()
) -> tuple[Prompt | None, list[str]]:
    """Return the prompt of a row (None if nothing usable is there), and what is wrong with it.

    Args:
        cells: field of a prompt to value; whatever is not there is absent.
        home: the folder that paths are relative to.
        store: where embedded images and sounds go.
        problems: what was found wrong with the row before.

    Returns:
        The prompt, and the problems, which name its id.

    Raises:
        PromptError: if an embedded image or sound cannot be written.
    """
    found = list(problems)
    texts = {f: _tried(found, partial(as_text, f, cells.get(f))) for f in _TEXTS}
    missing = [f"no {field}; add it" for field in ("id", "prompt") if cells.get(field) is None]
    media = {f: _tried(found, partial(files, cells.get(f), f, home, store)) or () for f in MEDIA}
    named = f"prompt {texts['id']!r}: " if texts["id"] is not None else ""
    found = [named + problem for problem in missing + found]
    if texts["id"] is None or texts["prompt"] is None:
        return None, found
    prompt = Prompt(
        texts["id"],
        texts["prompt"],
        media["image"],
        texts["answer"],
        texts["kind"],
        media["audio"],
        media["video"],
    )
    return prompt, found


def as_text(field: str, value: Any) -> str | None:
    """Return a cell as text; numbers as they are written.

    Args:
        field: what the cell is, for messages.
        value: a text, a number or None.

    Returns:
        The text; None for None.

    Raises:
        UnusableError: if it is something else.
    """
    if value is None or (isinstance(value, str) and is_unicode(value)):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise UnusableError(f"{field} is a {type(value).__name__}, not text; choose another column")


def _tried(problems: list[str], read: Callable[[], Any]) -> Any:
    try:
        return read()
    except UnusableError as error:
        problems.append(str(error))
        return None
