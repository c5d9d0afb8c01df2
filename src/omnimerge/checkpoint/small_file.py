"""Small files of a folder that a stranger may have made: each is what it should be, or refused."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from omnimerge.checkpoint.links import check_inside
from omnimerge.errors import CheckpointError

# Several times the largest tokenizer.json or index that is published.
_MOST_BYTES = 500_000_000
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def open_small(file: Path, *, folder: Path | None = None) -> BinaryIO:
    """Open a small file of a checkpoint, an adapter or an output.

    Args:
        file: path of the file, in the folder that it belongs to.
        folder: that folder, where the file is in a subfolder of it.

    Returns:
        The open file.

    Raises:
        CheckpointError: if it cannot be opened, is a link that leaves its folder, no regular file
            (such as a pipe, which would be waited for), or far too large.
    """
    check_inside(folder or file.parent, file)
    try:
        stream = os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {os.strerror(error.errno or 0)}") from error
    status = os.fstat(stream.fileno())
    why = "" if stat.S_ISREG(status.st_mode) else "it is no regular file"
    if status.st_size > _MOST_BYTES:  # nothing to a sparse file
        why = f"it has more than {_MOST_BYTES:,} bytes"
    if why:
        stream.close()
        raise CheckpointError(f"cannot read {file}: {why}")
    return stream


def read_bytes(file: Path) -> bytes:
    """Read a small file; see `open_small`.

    Args:
        file: path of the file.

    Returns:
        What is in it.

    Raises:
        CheckpointError: if it cannot be read.
    """
    with open_small(file) as stream:
        try:
            return stream.read(_MOST_BYTES)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error


def read_text(file: Path) -> str:
    """Read a small text file; see `open_small`.

    Args:
        file: path of the file.

    Returns:
        Its text.

    Raises:
        CheckpointError: if it cannot be read, or is not UTF-8.
    """
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not valid UTF-8: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a small JSON file that holds an object; see `open_small`.

    Args:
        file: path of the file.

    Returns:
        The object.

    Raises:
        CheckpointError: if the file cannot be read, is not JSON, or not an object.
    """
    try:
        value = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return value


def check_small_files(folder: Path) -> None:
    """Refuse a folder with a file that must not be opened, before another library opens them.

    Subfolders are looked into, since tokenizers and templates lie there as well.

    Args:
        folder: a checkpoint's folder.

    Raises:
        CheckpointError: naming the first such file: of a config, a tokenizer, a template, a card;
            or a subfolder that cannot be read, or is a link that leaves the folder.
    """
    for root, folders, files in os.walk(folder, onerror=refuse_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        check_inside(folder, *(Path(root, name) for name in folders))
        named = [*files, *folders] if Path(root) == folder else files
        for name in sorted(named):
            if Path(name).suffix in _SUFFIXES:
                open_small(Path(root, name), folder=folder).close()


def refuse_unreadable(error: OSError) -> None:
    """Refuse a folder that cannot be read: what `os.walk` calls, which passes over it otherwise.

    Args:
        error: what the system said.

    Raises:
        CheckpointError: naming the folder.
    """
    raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
