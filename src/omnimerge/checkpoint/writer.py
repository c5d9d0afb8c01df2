"""A checkpoint being written: every byte's place is known at the start, the folder appears last."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from omnimerge.checkpoint.dtypes import item_size
from omnimerge.checkpoint.headers import TensorMeta, read_safetensors_header
from omnimerge.errors import CheckpointError, OutputError

MANIFEST_NAME = "merge_manifest.json"
"""The file that marks a folder as the output of a merge."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


class CheckpointWriter:
    """Write safetensors shards in place, in a hidden sibling folder that is renamed at the end.

    Used as a context manager: leaving it normally commits, leaving it by an exception removes
    everything that was written, so `out` is either complete or not there.

    Args:
        out: the folder to create.
        shards: the tensors of each shard, in file order.
        overwrite: replace the folder of an earlier merge, once the new one is complete.
        stem: the weight files' name without its ending.

    Raises:
        OutputError: if `out` exists and may not be replaced, or the disk is full.
    """

    def __init__(
        self,
        out: Path,
        shards: Sequence[Sequence[OutputTensor]],
        *,
        overwrite: bool = False,
        stem: str = "model",
    ) -> None:
        self._stem = stem
        self.out = out if not out.is_symlink() else out.resolve()
        self._shards = shards
        self._overwrite = overwrite
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        self._made: list[Path] = []
        self.folder = self.out

    def __enter__(self) -> CheckpointWriter:
        refuse_existing(self.out, overwrite=self._overwrite)
        try:
            self._made = _make_folders(self.out.parent)
            prefix = f".{self.out.name}.omnimerge-"
            self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self.out.parent))
            self.folder.chmod(0o777 & ~_umask())
            self._create_shards()
        except OSError as error:
            self._discard()
            raise _explain(error, self.out) from error
        return self

    def write(self, name: str, data: memoryview, start: int = 0) -> None:
        """Write bytes of a tensor at their final place. Safe to call from several threads.

        Args:
            name: a tensor of the output.
            data: contiguous bytes.
            start: position of the first byte within the tensor.

        Raises:
            OutputError: if the bytes cannot be written.
        """
        descriptor, offset = self._places[name]
        position = offset + start
        try:
            while data.nbytes:
                count = os.pwrite(descriptor, data, position)
                data, position = data[count:], position + count
        except OSError as error:
            raise _explain(error, self.out) from error

    def read_back(self) -> dict[str, TensorMeta]:
        """Read the headers of the written shards.

        Returns:
            Tensor name -> what the header says of it.
        """
        files = [self.folder / self._shard_name(n) for n in self._numbers()]
        return {meta.name: meta for file in files for meta in read_safetensors_header(file)}

    def _shard_name(self, number: int) -> str:
        count = len(self._shards)
        which = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
        return f"{self._stem}{which}.safetensors"

    def _numbers(self) -> range:
        return range(1, len(self._shards) + 1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            if isinstance(error, OSError):  # from whoever added files to the folder
                raise _explain(error, self.out) from error
            return
        try:
            self._commit()
        except OSError as problem:
            self._discard()
            raise _explain(problem, self.out) from problem
        except BaseException:
            self._discard()
            raise

    def _create_shards(self) -> None:
        for number, tensors in enumerate(self._shards, start=1):
            header, starts = _header(tensors)
            path = self.folder / self._shard_name(number)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self._descriptors.append(descriptor)
            total = len(header) + sum(tensor.nbytes for tensor in tensors)
            _reserve(descriptor, total)
            os.pwrite(descriptor, header, 0)
            for tensor, begin in zip(tensors, starts, strict=True):
                self._places[tensor.name] = (descriptor, len(header) + begin)

    def _commit(self) -> None:
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        self._close()
        if len(self._shards) > 1:
            self._write_index()
        _sync_folder(self.folder)
        refuse_existing(self.out, overwrite=self._overwrite)  # it may have appeared meanwhile
        _replace(self.folder, self.out)
        _sync_folder(self.out.parent)

    def _write_index(self) -> None:
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(self._shards, start=1):
            file = self._shard_name(number)
            weight_map.update({tensor.name: file for tensor in tensors})
        total = sum(tensor.nbytes for tensors in self._shards for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        path = self.folder / f"{self._stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _discard(self) -> None:
        while True:
            try:
                self._remove()
            except KeyboardInterrupt:  # a second one: tidy up first, the first still ends the run
                continue
            return

    def _remove(self) -> None:
        self._close()
        if self.folder != self.out:
            shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a folder that is not empty is not ours any more
            for folder in self._made:
                folder.rmdir()


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that is not empty.

    Args:
        out: the folder that is to be created.
        overwrite: whether the user allowed to replace it. Only the folder of an earlier merge,
            which holds ``merge_manifest.json``, is ever replaced.

    Raises:
        OutputError: if it exists, is not empty, and may not be replaced.
    """
    try:
        if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
            return
        if not out.is_dir():
            raise OutputError(f"{out} is no folder; give one that does not exist yet")
        if not overwrite:
            raise OutputError(f"{out} exists and is not empty; give another folder or --overwrite")
        if not (out / MANIFEST_NAME).is_file():
            raise OutputError(
                f"{out} is not the folder of an earlier merge (it has no {MANIFEST_NAME}) and is "
                "not replaced; give another folder"
            )
    except OSError as error:
        raise _explain(error, out) from error


def _header(tensors: Sequence[OutputTensor]) -> tuple[bytes, list[int]]:
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
            if error.errno in _DISK_FULL:
                raise
            # Some network file systems cannot reserve; then the space shows while writing.
    os.ftruncate(descriptor, size)


def _replace(new: Path, out: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.omnimerge-old-", dir=out.parent))
    try:
        out.rename(old / out.name)
        try:
            new.rename(out)
        except OSError:
            (old / out.name).rename(out)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _make_folders(folder: Path) -> list[Path]:
    """Create a folder and its parents; return those that were created, the deepest first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets folders be synced
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _explain(error: OSError, out: Path) -> OutputError:
    """Say what went wrong in terms of the folder the user asked for."""
    if error.errno in _DISK_FULL:
        return OutputError(
            f"no space left for {out} ({error.strerror}); free some, or give a folder elsewhere"
        )
    return OutputError(f"cannot write {out}: {error.strerror or error}")


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
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {source / name}: {error.strerror}") from error
        destination = folder / renamed.get(str(name), str(name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(content)
