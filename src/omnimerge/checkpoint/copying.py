"""Copies of a checkpoint's files that are no weights, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from omnimerge.errors import CheckpointError

_BLOCK = 1 << 22


def copy_files(
    source: Path, names: Sequence[Path], folder: Path, renamed: Mapping[str, str]
) -> None:
    """Copy files of a checkpoint as they are, symbolic links followed.

    Args:
        source: the folder they are in.
        names: paths relative to `source`.
        folder: where they go.
        renamed: new names for some of them.

    Raises:
        CheckpointError: if a file cannot be read.
        OSError: if it cannot be written.
    """
    for name in names:
        destination = folder / renamed.get(str(name), str(name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = (source / name).open("rb")
        except OSError as error:
            raise CheckpointError(f"cannot read {source / name}: {error.strerror}") from error
        with stream, destination.open("wb") as copy:
            while block := _read(stream, source / name):
                copy.write(block)


def _read(stream: BinaryIO, name: Path) -> bytes:
    try:
        return stream.read(_BLOCK)
    except OSError as error:
        raise CheckpointError(f"cannot read {name}: {error.strerror}") from error
