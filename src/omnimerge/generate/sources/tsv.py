"""Prompts in a TSV of VLMEvalKit: index, question, options A to Z, and images as base64 or paths.

The text is what VLMEvalKit's plain multiple-choice prompt is (`ImageMCQDataset.build_prompt`)::

    Hint: {hint}
    Question: {question}
    Options:
    A. {A}
    B. {B}
    Please select the correct answer from the options above.

with a space before its last line break, and without the parts that a row lacks. In a file that has
neither options nor hints it is the question alone (`ImageBaseDataset.build_prompt`). Unlike there,
an option or question that reads ``None`` or ``NA`` is kept, and so are rows without an image.
"""

from __future__ import annotations

import ast
import csv
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omnimerge.errors import PromptError
from omnimerge.generate.sources.columns import choose
from omnimerge.generate.sources.embedded import REFERENCE, MediaFolder, UnusableError, files
from omnimerge.generate.sources.prompt import Gathering, Prompt
from omnimerge.generate.sources.tables import prompt_of

_COLUMNS = {
    "id": "index",
    "prompt": "question",
    "image": "image",
    "answer": "answer",
    "kind": "category",
}
_PATHS = "image_path"
_LARGEST_FIELD = 2**31 - 1


def read(
    path: Path, columns: Mapping[str, str], store: MediaFolder, *, labels: bool
) -> list[Prompt]:
    """Read a TSV.

    Args:
        path: the file.
        columns: field of a prompt to column, where they differ from VLMEvalKit's: index, question,
            image, category, answer.
        store: where embedded images go.
        labels: whether to read answers; else their column is not looked at.

    Returns:
        The prompts, in the order of the file.

    Raises:
        PromptError: naming every problem of the file at once (the first five in full).
    """
    gathering = Gathering(path, "row")
    rows: list[tuple[int, dict[str, Any], list[str]]] = []
    with _large_fields():
        for number, raw, problem in _rows(path):
            if raw is None:
                gathering.add(number, None, [problem])
                continue
            if not rows:
                chosen = choose(path, list(raw), columns, _COLUMNS, labels=labels)
            rows.append((number, *_cells(raw, chosen, path.parent, store)))
    _share_images([cells for _, cells, _ in rows])
    for number, cells, problems in rows:
        gathering.add(number, *prompt_of(cells, path.parent, store, problems))
    return gathering.finish("holds no rows below its header")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str] | None, str]]:
    """Each row, counted from 1 after the header: its cells, or None and the problem."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t", strict=True)
            header = next(lines, [])
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise PromptError(f"{path} has two columns {twice[0]!r}; rename one")
            for number, row in enumerate(lines, start=1):
                if len(row) == len(header):
                    yield number, dict(zip(header, row, strict=True)), ""
                elif row:
                    counts = f"{len(row)} fields, the header {len(header)}"
                    yield (
                        number,
                        None,
                        f"has {counts}; put fields with tabs, quotes or line breaks in quotes",
                    )
    except csv.Error as error:
        yield number + 1, None, f"is no TSV row ({error}); write the file with pandas or csv"
    except UnicodeDecodeError:
        raise PromptError(f"{path} is not UTF-8; save the file as UTF-8") from None
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file; give a TSV file of prompts") from None
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror}); give a TSV file") from error


def _cells(
    raw: Mapping[str, str], chosen: Mapping[str, str], home: Path, store: MediaFolder
) -> tuple[dict[str, Any], list[str]]:
    """A row by the fields of a prompt, its embedded images written out, and its problems."""
    cells: dict[str, Any] = {field: raw[column] or None for field, column in chosen.items()}
    letters = [c for c in string.ascii_uppercase if c in raw and c not in chosen.values()]
    if cells["prompt"] is not None and (letters or "hint" in raw):
        options = [(letter, raw[letter]) for letter in letters if raw[letter]]
        cells["prompt"] = multiple_choice(cells["prompt"], options, raw.get("hint", ""))
    image = cells.get("image")
    if image is None and raw.get(_PATHS):
        cells["image"] = _as_list(raw[_PATHS])
    elif image is not None and len(image) > REFERENCE:
        try:
            cells["image"] = files(_as_list(image), "image", home, store)
        except UnusableError as error:
            return cells | {"image": None}, [str(error)]
    return cells, []


def multiple_choice(question: str, options: Sequence[tuple[str, str]], hint: str = "") -> str:
    """Return a question as VLMEvalKit asks it.

    Args:
        question: the question.
        options: letters and texts; there may be none.
        hint: what is said before the question, if anything.

    Returns:
        The text of the user's turn.
    """
    text = f"Hint: {hint}\n" if hint else ""
    text += f"Question: {question}\n"
    if options:
        listed = "".join(f"{letter}. {option}\n" for letter, option in options)
        text += f"Options:\n{listed}Please select the correct answer from the options above. \n"
    return text


def _share_images(rows: Sequence[dict[str, Any]]) -> None:
    """Where the image of a row is the id of another one, give it that one's image."""
    known = {row["id"]: row["image"] for row in rows if isinstance(row.get("image"), tuple)}
    for row in rows:
        if isinstance(row.get("image"), str):
            row["image"] = known.get(row["image"], row["image"])


def _as_list(text: str) -> list[str]:
    """Several images are written as a Python list; one as it is."""
    if text.startswith("[") and text.endswith("]"):
        try:
            found = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return [text]
        return [str(item) for item in found]
    return [text]


@contextmanager
def _large_fields() -> Iterator[None]:
    """Images in base64 are longer than the 128 KiB that the csv module allows by itself."""
    before = csv.field_size_limit(_LARGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
