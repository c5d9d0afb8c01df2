"""Prompts as JSON lines, the format of omnimerge itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnimerge.errors import PromptError, suggestion
from omnimerge.generate.sources.prompt import (
    FIELDS,
    MEDIA,
    Gathering,
    Prompt,
    is_file,
    is_unicode,
)

_REQUIRED = ("id", "prompt")
_TEXTS = ("id", "prompt", "answer", "kind")


def read(path: Path, columns: Mapping[str, str]) -> list[Prompt]:
    """Read a JSONL file.

    Args:
        path: the file.
        columns: field to key, where the keys are called otherwise. With such a map, keys that it
            does not name are left alone; without it, unknown keys are refused.

    Returns:
        The prompts, in the order of the file, with their answers.

    Raises:
        PromptError: naming every problem of the file at once (the first five in full).
    """
    gathering = Gathering(path, "line")
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            gathering.add(number, *_parse(line, path.parent, columns))
    return gathering.finish(
        'holds no prompt; write one JSON object per line: {"id": "1", "prompt": "..."}'
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file; give a JSONL file of prompts") from None
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    except OSError as error:
        raise PromptError(
            f"{path}: cannot be read ({error.strerror}); give a JSONL file"
        ) from error


def _parse(line: str, folder: Path, columns: Mapping[str, str]) -> tuple[Prompt | None, list[str]]:
    """One line as a prompt (None if nothing usable is there), and what is wrong with it."""
    try:
        raw = json.loads(line, parse_int=str, parse_float=str)
    except (ValueError, RecursionError) as error:
        return None, [f"not JSON ({error}); write one JSON object per line"]
    if not isinstance(raw, dict):
        return None, ['not a JSON object; write {"id": "1", "prompt": "..."}']
    problems = _key_problems(raw, columns)
    cells = {field: raw.get(columns.get(field, field)) for field in FIELDS}
    media = {}
    for field in MEDIA:
        media[field], missing = _files(field, cells[field], folder)
        problems += missing
    for field in _TEXTS:
        problems += _text_problems(field, cells[field])
    texts = {f: cells[f] if isinstance(cells[f], str) else None for f in _TEXTS}
    if texts["id"] is None or texts["prompt"] is None:
        return None, problems
    prompt = Prompt(
        texts["id"],
        texts["prompt"],
        media["image"],
        texts["answer"],
        texts["kind"],
        media["audio"],
        media["video"],
    )
    return prompt, problems


def _key_problems(raw: dict[str, Any], columns: Mapping[str, str]) -> list[str]:
    required = [columns.get(field, field) for field in _REQUIRED]
    problems = [f"no {key!r}; add it" for key in required if raw.get(key) is None]
    for key in raw if not columns else ():
        if key not in FIELDS:
            hint = suggestion(key, FIELDS) or f"; known: {', '.join(FIELDS)}"
            problems.append(f"unknown key {key!r}{hint}")
    return problems


def _text_problems(field: str, value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, str):
        return [f"{field} {json.dumps(value)} is not text; put it in quotes"]
    if not is_unicode(value):
        return [f"{field} {json.dumps(value)} holds half a character; repair the text"]
    return []


def _files(field: str, value: Any, folder: Path) -> tuple[tuple[Path, ...], list[str]]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        return (), [f"{field} {json.dumps(value)} is not a path or a list of paths"]
    files = tuple(folder / name for name in names)
    kind = "a file or a folder of frames" if field == "video" else "a file"
    return files, [
        f"{field} {name!r} is not {kind}; paths are relative to {folder}"
        for name, file in zip(names, files, strict=True)
        if not is_file(file, or_folder=field == "video")
    ]
