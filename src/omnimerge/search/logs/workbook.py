"""Excel workbooks, cell by cell as text."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from omnimerge.errors import SearchError
from omnimerge.search.logs.log import as_text

_MOST_BYTES = 500 * 10**6  # unpacked: a workbook of a million answers is smaller
_LONGEST = 32767  # characters that a cell holds; pandas cuts longer ones with a mere warning


def read_workbook(
    path: Path, data: bytes
) -> tuple[Iterator[tuple[str, Mapping[str, Any]]], list[str]]:
    """Read the first sheet of a workbook.

    Text cells, which is what VLMEvalKit writes, are taken as they are: ``None``, ``NA``, ``1.0``
    and ``007`` stay what they are, and an empty cell is ``""``. A number cell no longer knows how
    it was written: 1.0 and 1 are both ``1``. Formulas are text, not computed.

    Args:
        path: the file, for messages.
        data: its bytes.

    Returns:
        ((place, column -> text) per row, notes).

    Raises:
        SearchError: if openpyxl is missing, or the file is no workbook.
    """
    rows = _cells(path, data)
    names = [as_text(cell) for cell in rows[0]] if rows else []
    cut = sum(isinstance(cell, str) and len(cell) >= _LONGEST for row in rows for cell in row)
    notes = [f"{cut} cells are full ({_LONGEST} characters) and may be cut off"] if cut else []

    def named() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, row in enumerate(rows[1:], start=2):
            if any(cell is not None for cell in row):
                cells = [*row, *[None] * (len(names) - len(row))]  # empty cells at the end
                yield f"row {number}", dict(zip(names, map(as_text, cells), strict=False))

    return named(), notes


def _cells(path: Path, data: bytes) -> list[tuple[Any, ...]]:
    try:
        openpyxl = import_module("openpyxl")
    except ImportError as error:
        raise SearchError(
            f'{path}: a workbook needs openpyxl to be read; pip install "omnimerge[xlsx]", or let '
            "VLMEvalKit write another format with PRED_FORMAT=tsv"
        ) from error
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _MOST_BYTES:
            raise SearchError(
                f"{path}: {unpacked:,} bytes when unpacked, more than the {_MOST_BYTES:,} that are "
                "read; let VLMEvalKit write another format with PRED_FORMAT=tsv"
            )
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True)
        try:
            sheet = book.worksheets[0]
            sheet.reset_dimensions()  # some programs write a size that is not the sheet's
            return [tuple(row) for row in sheet.iter_rows(values_only=True)]
        finally:
            book.close()
    except (
        zipfile.BadZipFile,
        zlib.error,
        KeyError,
        ValueError,
        IndexError,
        EOFError,
        SyntaxError,
    ) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SearchError(
            f"{path}: a damaged or cut-off workbook, or another zip file ({first}); copy it again "
            "or run again"
        ) from error
