"""One file of any known format, told by its content and not by its name."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omnimerge.errors import SearchError
from omnimerge.search.logs.log import Log, collect
from omnimerge.search.logs.records import kind_of, parse_rows
from omnimerge.search.logs.workbook import read_workbook

_Rows = Iterator[tuple[str, Mapping[str, Any]]]

_READABLE = (
    "known: lmms-eval's samples (.json, .jsonl), VLMEvalKit's predictions (.xlsx, .tsv, .json), "
    "JSON lines of 'id' and 'response'"
)


def open_file(path: Path, *, filtered: bool = False) -> Log:
    """Read a file of answers.

    Args:
        path: the file.
        filtered: as for `open_log`.

    Returns:
        Its answers.

    Raises:
        SearchError: if it cannot be read, or is no log of answers.
    """
    data = _bytes(path)
    rows: _Rows
    notes: list[str] = []
    if data.startswith(b"PK\x03\x04"):
        rows, notes = read_workbook(path, data)
    elif data.startswith(b"\x80"):
        raise SearchError(
            f"{path} is a pickle, which can run code when it is read; VLMEvalKit falls back to it "
            "where it cannot write: run it again with PRED_FORMAT=tsv"
        )
    else:
        rows = _rows(path, _text(path, data))
    first = next(rows, None)
    if first is None:
        raise SearchError(f"{path} holds no answer; was the run stopped? Run it again")
    kind = kind_of(path, first[1])
    rows = itertools.chain([first], rows)
    return collect(path, kind, parse_rows(path, kind, rows, filtered), notes)


def _rows(path: Path, text: str) -> _Rows:
    if not text.lstrip().startswith(("{", "[")):
        return _table(path, text)
    text = text.lstrip()
    try:
        first, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise SearchError(
            f"{path}: damaged or cut off ({error}); copy it again or run again"
        ) from None
    if isinstance(first, list):
        return _objects(path, first)
    if isinstance(first.get("logs"), list):
        return _objects(path, first["logs"])
    return _lines(path, text) if text[end:].strip() else iter([("entry 1", first)])


def _objects(path: Path, values: list[Any]) -> _Rows:
    for number, raw in enumerate(values, start=1):
        if not isinstance(raw, dict):
            raise SearchError(f"{path}, entry {number}: not a JSON object; {_READABLE}")
        yield f"entry {number}", raw


def _lines(path: Path, text: str) -> _Rows:
    # Only "\n" ends a line: other line separators may stand inside an answer.
    lines = text.rstrip().split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            raw = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            what = "cut off" if number == len(lines) else "not JSON"
            raise SearchError(
                f"{path}, line {number}: {what} ({error}); delete the line or run again"
            ) from None
        if not isinstance(raw, dict):
            raise SearchError(f"{path}, line {number}: not a JSON object; {_READABLE}")
        yield f"line {number}", raw


def _table(path: Path, text: str) -> _Rows:
    """Tab-separated values, as VLMEvalKit writes them, or comma-separated ones."""
    head = text.split("\n", 1)[0]
    if "\t" not in head and "," not in head:
        raise SearchError(f"{path}: unknown format (it begins {head[:40]!r}); {_READABLE}")
    limit = csv.field_size_limit(sys.maxsize)  # the default is less than some answers
    try:
        source = io.StringIO(text, newline="")
        names, *rows = csv.reader(source, delimiter="\t" if "\t" in head else ",")
    except csv.Error as error:
        raise SearchError(f"{path}: not a table ({error}); {_READABLE}") from error
    finally:
        csv.field_size_limit(limit)
    kind_of(path, names)
    for number, cells in enumerate(rows, start=1):
        if len(cells) not in (0, len(names)):
            raise SearchError(
                f"{path}, row {number}: {len(cells)} of {len(names)} columns, so the file is cut "
                "off or was edited; copy it again or run again"
            )
        if cells:
            yield f"row {number}", dict(zip(names, cells, strict=True))


# Numbers stay as they are written; NaN, which pandas writes, is nothing.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=lambda _: None)


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SearchError(f"{path}: no such file; give a log of answers") from None
    except OSError as error:
        raise SearchError(f"{path}: cannot be read ({error.strerror}); give a file") from error
    if not data.strip():
        raise SearchError(f"{path} is empty; was the run stopped? Run it again")
    return data


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SearchError(
            f"{path}: unknown format (byte {error.start} is not UTF-8); {_READABLE}"
        ) from None
