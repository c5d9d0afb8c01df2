"""What of an output is safely on disk, so that a merge that was killed can go on.

One JSON value a line: first the key of the merge, then, again and again, the ranges of bytes of
every shard that are written. A line is added only when the disk has the bytes it speaks of, so that
the journal never promises too much, not even after a loss of power. A line that was cut off while
it was written is ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from omnimerge.checkpoint.shard import ShardFile

INTERVAL = 0.3
"""Seconds between two lines, or as many as the last one took: the end waits for what is left."""


def read_journal(file: Path) -> tuple[str, list[list[list[int]]]]:
    """Read a journal.

    Args:
        file: the journal.

    Returns:
        The key of the merge, empty if there is no journal; and per shard the ranges written.
    """
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except OSError:
        return "", []
    key = _key_in(lines[0]) if lines else ""
    ranges: list[list[list[int]]] = []
    for line in lines[1:] if key else ():
        try:
            entry = json.loads(line if line.endswith(b"\n") else b"")
        except (ValueError, RecursionError):
            break
        if not _are_ranges(entry):
            break
        ranges = entry
    return key, ranges


def journal_key(file: Path) -> str:
    """Read the key of the merge that a journal is of.

    Args:
        file: the journal.

    Returns:
        The key; empty if there is no journal.
    """
    try:
        with file.open("rb") as stream:
            return _key_in(stream.readline())
    except OSError:
        return ""


def begin_journal(file: Path, key: str, ranges: Sequence[object]) -> None:
    """Put a journal in the place of another: from one whole journal to the next, on disk.

    Args:
        file: the journal.
        key: of the merge.
        ranges: per shard what the disk has of it, as `read_journal` gives it; no more is promised.

    Raises:
        OSError: if the disk does not take it; the journal is as it was then.
    """
    fresh = file.with_suffix(".new")
    with fresh.open("wb", buffering=0) as stream:
        _add_line(stream, {"merge": key})
        _add_line(stream, ranges)
    fresh.replace(file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder.

    Args:
        folder: the folder.
    """
    with contextlib.suppress(OSError):  # not every file system lets folders be synced
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _add_line(stream: FileIO, value: object) -> None:
    stream.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
    os.fsync(stream.fileno())


def _are_ranges(entry: object) -> bool:
    """Whether a line holds pairs of growing numbers, in a list per shard."""
    return isinstance(entry, list) and all(
        isinstance(shard, list)
        and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(number) is int for number in pair)
            and 0 <= pair[0] <= pair[1]
            for pair in shard
        )
        for shard in entry
    )


def _key_in(line: bytes) -> str:
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return ""
    return str(entry["merge"]) if isinstance(entry, dict) and "merge" in entry else ""


class Journal:
    """Writes a journal, in a thread of its own.

    Args:
        file: the journal; what it holds is replaced.
        key: of the merge.
        shards: the files it speaks of.

    Attributes:
        lost: what the disk said when it lost bytes that were written, if it did. It says so once a
            file: a later sync of the same file succeeds.
    """

    def __init__(self, file: Path, key: str, shards: Sequence[ShardFile]) -> None:
        self.lost: OSError | None = None
        self._shards = shards
        self._written = [shard.ranges() for shard in shards]
        self._stopping = threading.Event()
        self._noting = threading.Lock()  # an older line after a newer one would promise less
        for shard in shards:
            self._sync(shard)
        begin_journal(file, key, self._written)
        self._stream = file.open("ab", buffering=0)
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """Bytes of the output, headers included, that a later merge would not write again."""
        return sum(stop - start for shard in self._written for start, stop in shard)

    def note(self) -> None:
        """Wait for the disk, then write down what it has.

        Raises:
            OSError: if the disk does not take what was written, or the line about it.
        """
        with self._noting:
            if self.lost:
                raise self.lost
            ranges = [shard.ranges() for shard in self._shards]
            if ranges == self._written:
                return
            for shard, now, before in zip(self._shards, ranges, self._written, strict=True):
                if now != before:
                    self._sync(shard)
            _add_line(self._stream, ranges)
            self._written = ranges

    def stop(self) -> None:
        """Stop the thread and close the file, which stays; may be called again."""
        self._stopping.set()
        self._thread.join()
        self._stream.close()

    def _run(self) -> None:
        took = 0.0
        while not self._stopping.wait(max(INTERVAL, took)):
            start = time.monotonic()
            try:
                self.note()
            except OSError:  # nothing more is promised; the commit looks at `lost`
                return
            took = time.monotonic() - start

    def _sync(self, shard: ShardFile) -> None:
        try:
            shard.sync()
        except OSError as error:
            self.lost = error
            raise
