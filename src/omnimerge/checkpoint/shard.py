"""One weight file that is being written at known places, hashed as it grows."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omnimerge.checkpoint.dtypes import item_size
from omnimerge.checkpoint.openfile import OpenFile
from omnimerge.checkpoint.ranges import Ranges

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes."""
        size = item_size(self.dtype)
        for n in self.shape:
            size *= n
        return size


def shard_by_size(tensors: Sequence[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    """Cut a list of tensors into shards of at most `limit` bytes, in order.

    Args:
        tensors: in the order in which they are to be written.
        limit: bytes per shard; a tensor larger than that gets a shard of its own.

    Returns:
        The shards, none empty.
    """
    shards: list[list[OutputTensor]] = []
    used = 0
    for tensor in tensors:
        if not shards or used + tensor.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return shards


class ShardFile:
    """A safetensors file whose every byte has its place from the start.

    Args:
        path: the file.
        tensors: its tensors, in file order.
        begin_anew: whether what is there is thrown away.
        hashing: whether it is hashed as it grows, or when it is asked for its digest.

    Attributes:
        places: tensor -> offset of its first byte.
        size: bytes of the whole file.
        done: which bytes are written, the header included.

    Raises:
        OSError: if the file cannot be made, or the disk is full.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[OutputTensor],
        *,
        begin_anew: bool,
        hashing: bool = True,
    ) -> None:
        header, starts = safetensors_header(tensors)
        self.path = path
        self.size = len(header) + sum(tensor.nbytes for tensor in tensors)
        self.places = {t.name: len(header) + s for t, s in zip(tensors, starts, strict=True)}
        self.done = Ranges()
        self._lock = threading.Lock()
        self._hash_at_once, self._hashing = hashing, threading.Lock()
        self._hash, self._hashed = hashlib.sha256(), 0
        self._syncing = threading.Lock()
        self._lost: OSError | None = None
        self._file = OpenFile(path, os.O_RDWR, self._sync_last)
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if begin_anew else 0)
        os.close(os.open(path, flags, 0o666))
        try:
            with self._file.used() as descriptor:
                _reserve(descriptor, self.size)
            self.write(memoryview(header), 0)
        except BaseException:
            self.close()
            raise

    def write(self, data: memoryview, position: int) -> None:
        """Write bytes at a place of the file. Safe to call from several threads.

        Args:
            data: contiguous bytes.
            position: of the first one.

        Raises:
            OSError: if they cannot be written.
        """
        start = position
        with self._file.used() as descriptor:
            while data.nbytes:
                count = os.pwrite(descriptor, data, position)
                data, position = data[count:], position + count
        self.mark(start, position)

    def mark(self, start: int, stop: int) -> None:
        """Count bytes as written, and hash what can be.

        Args:
            start: the first.
            stop: one past the last.
        """
        with self._lock:
            self.done.add(start, stop)
        # One thread hashes, the others go on.
        if self._hash_at_once and self._hashing.acquire(blocking=False):
            try:
                self._advance()
            finally:
                self._hashing.release()

    def covers(self, start: int, stop: int) -> bool:
        """Tell whether bytes are written.

        Args:
            start: the first.
            stop: one past the last.

        Returns:
            Whether all of them are.
        """
        with self._lock:
            return self.done.covers(start, stop)

    def ranges(self) -> list[tuple[int, int]]:
        """List what is written.

        Returns:
            (First byte, one past the last) of every range.
        """
        with self._lock:
            return list(self.done)

    @property
    def nbytes_done(self) -> int:
        """How many bytes are written, the header included."""
        with self._lock:
            return self.done.total

    def sync(self) -> None:
        """Wait until the disk has what was written.

        Raises:
            OSError: if it does not, or has lost what an earlier call waited for.
        """
        with self._file.used() as descriptor:
            self._sync(descriptor)

    def digest(self) -> str:
        """Return the SHA-256 of the whole file, as it is on disk.

        Returns:
            The digest in hexadecimal.
        """
        with self._hashing:
            self._advance()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _sync(self, descriptor: int) -> None:
        with self._syncing:
            if self._lost:
                raise self._lost
            try:
                os.fsync(descriptor)
            except OSError as error:  # told once: a later call for the same file succeeds
                self._lost = error
                raise

    def _sync_last(self, descriptor: int) -> None:
        """Before it is closed: no other descriptor is told of what was written through this one."""
        with contextlib.suppress(OSError):  # whoever relies on it calls `sync`, and is told
            self._sync(descriptor)

    def _advance(self) -> None:
        """Hash what follows without a gap on what is hashed; the system still has it in memory."""
        while True:
            with self._lock:
                stop = min(self.done.stop_after(self._hashed), self._hashed + _BLOCK)
            if stop == self._hashed:
                return
            with self._file.used() as descriptor:
                block = os.pread(descriptor, stop - self._hashed, self._hashed)
            if not block:
                return
            self._hash.update(block)
            self._hashed += len(block)


def safetensors_header(tensors: Sequence[OutputTensor]) -> tuple[bytes, list[int]]:
    """Return the head of a safetensors file.

    Args:
        tensors: its tensors, in file order.

    Returns:
        Length and header, padded to 8 bytes; and where each tensor begins behind it.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = [], 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        starts.append(position)
        position = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, starts


def _reserve(descriptor: int, size: int) -> None:
    """Take the space now, so that a full disk is met before the work and not after it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            # Some network file systems cannot reserve; then the space shows while writing.
    os.ftruncate(descriptor, size)
