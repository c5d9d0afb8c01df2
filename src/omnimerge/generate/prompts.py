"""Prompt files: JSON lines with an id, a prompt, images, and for display only an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omnimerge.errors import PromptError, suggestion

_KEYS = ("id", "prompt", "image", "answer", "kind")
_REQUIRED = ("id", "prompt")
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question to a model.

    Attributes:
        id: unique in its file.
        prompt: the text of the user's turn.
        images: image files, in the order in which the model sees them, before the text.
        answer: the right answer, where known. Never used to choose a coefficient.
        kind: a label to group results by, where given.
    """

    id: str
    prompt: str
    images: tuple[Path, ...] = ()
    answer: str | None = None
    kind: str | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Read a JSONL file of prompts.

    Each line is ``{"id", "prompt", "image"?: path or list of paths, "answer"?, "kind"?}``.
    Image paths are relative to the file. Numbers given as id or answer are kept as they are
    written (``1.0`` stays ``"1.0"``). Empty lines are skipped.

    Args:
        path: the file.

    Returns:
        The prompts, in the order of the file.

    Raises:
        PromptError: naming every problem of the file at once (the first five in full).
    """
    problems: list[str] = []
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        prompt, found = _parse(line, path.parent)
        if prompt is not None and prompt.id in seen:
            found.append(f"id {prompt.id!r} was used on line {seen[prompt.id]}; give unique ids")
        problems += [f"line {number}: {problem}" for problem in found]
        if prompt is not None:
            seen.setdefault(prompt.id, number)
            prompts.append(prompt)
    if not prompts and not problems:
        problems = ['holds no prompt; write one JSON object per line: {"id": "1", "prompt": "..."}']
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise PromptError(f"{path}: " + "; ".join(problems[:_SHOWN]) + more)
    return prompts


def sample(prompts: Sequence[Prompt], n: int, seed: int) -> list[Prompt]:
    """Draw `n` prompts, the same ones for the same ids and seed, in the order given.

    The draw orders the prompts by a hash of seed and id. So it depends neither on the order of the
    file nor on the Python version, and a smaller sample is a part of a larger one. (The published
    AdaMMS script draws with ``random.sample`` in loop order, seed 2.)

    Args:
        prompts: the prompts to draw from.
        n: how many; all of them if there are no more than `n`.
        seed: any integer.

    Returns:
        The sample.

    Raises:
        PromptError: if `n` is not positive.
    """
    if n < 1:
        raise PromptError(f"a sample of {n} prompts is empty; give a number of 1 or more")
    ranked = sorted(prompts, key=lambda p: hashlib.sha256(f"{seed}:{p.id}".encode()).digest())
    drawn = {prompt.id for prompt in ranked[:n]}
    return [prompt for prompt in prompts if prompt.id in drawn]


def without_answers(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts with every answer taken out.

    Args:
        prompts: prompts, with or without answers.

    Returns:
        Copies whose `answer` is None.
    """
    return [replace(prompt, answer=None) for prompt in prompts]


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


def _parse(line: str, folder: Path) -> tuple[Prompt | None, list[str]]:
    """One line as a prompt (None if nothing usable is there), and what is wrong with it."""
    try:
        raw = json.loads(line, parse_int=str, parse_float=str)
    except (ValueError, RecursionError) as error:
        return None, [f"not JSON ({error}); write one JSON object per line"]
    if not isinstance(raw, dict):
        return None, ['not a JSON object; write {"id": "1", "prompt": "..."}']
    problems = _key_problems(raw)
    images, missing = _images(raw.get("image"), folder)
    problems += missing
    texts = {key: raw.get(key) for key in ("id", "prompt", "answer", "kind")}
    for key, value in texts.items():
        if value is not None and not isinstance(value, str):
            problems.append(f"{key} {json.dumps(value)} is not text; put it in quotes")
        elif value is not None and not _is_unicode(value):
            problems.append(f"{key} {json.dumps(value)} holds half a character; repair the text")
    if not isinstance(texts["id"], str) or not isinstance(texts["prompt"], str):
        return None, problems
    answer, kind = (v if isinstance(v, str) else None for v in (texts["answer"], texts["kind"]))
    return Prompt(texts["id"], texts["prompt"], images, answer, kind), problems


def _key_problems(raw: dict[str, Any]) -> list[str]:
    problems = [f"no {key!r}; add it" for key in _REQUIRED if raw.get(key) is None]
    for key in raw:
        if key not in _KEYS:
            hint = suggestion(key, _KEYS) or f"; known: {', '.join(_KEYS)}"
            problems.append(f"unknown key {key!r}{hint}")
    return problems


def _images(value: Any, folder: Path) -> tuple[tuple[Path, ...], list[str]]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        return (), [f"image {json.dumps(value)} is not a path or a list of paths"]
    images = tuple(folder / name for name in names)
    return images, [
        f"image {name!r} is not a file; paths are relative to {folder}"
        for name, image in zip(names, images, strict=True)
        if not _is_file(image)
    ]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, a null byte, no permission
        return False


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
