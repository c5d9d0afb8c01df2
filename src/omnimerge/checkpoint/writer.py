"""A checkpoint being written: every byte's place is known at the start, the folder appears last."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from omnimerge.checkpoint.headers import TensorMeta, read_safetensors_header
from omnimerge.checkpoint.journal import Journal, begin_journal, read_journal
from omnimerge.checkpoint.shard import DISK_FULL, OutputTensor, ShardFile, safetensors_header
from omnimerge.checkpoint.staging import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    Staging,
    final_place,
    is_finished,
    manifest_key,
)
from omnimerge.errors import CheckpointError, InputChangedError, NonFiniteError, OutputError

__all__ = ["MANIFEST_NAME", "CheckpointWriter", "OutputTensor", "refuse_existing", "refuse_mounted"]


class CheckpointWriter:
    """Write safetensors shards in place, in a hidden sibling folder that is renamed at the end.

    Used as a context manager: leaving it normally commits, so `out` is either complete or not
    there. Leaving it by an exception removes what was written; with a `key`, what is in the journal
    stays to be resumed, unless the inputs are at fault.

    Args:
        out: the folder to create.
        shards: the tensors of each shard, in file order.
        overwrite: replace the folder of an earlier merge, once the new one is complete.
        stem: the weight files' name without its ending.
        key: what the output's bytes depend on, as a digest; a journal is kept under it.
        resume: go on with what a writer of the same key left.
        hashing: whether files are hashed as they grow; else `digests` needs to be given them.

    Attributes:
        folder: the hidden folder, where files may be added.
        key: as given.
        resumed: bytes of tensors that an earlier writer had written.

    Raises:
        OutputError: if `out` exists and may not be replaced, the disk is full, another process is
            writing it, or something else was left there.
    """

    def __init__(
        self,
        out: Path,
        shards: Sequence[Sequence[OutputTensor]],
        *,
        overwrite: bool = False,
        stem: str = "model",
        key: str = "",
        resume: bool = False,
        hashing: bool = True,
    ) -> None:
        self.out = final_place(out)
        self.folder = self.out
        self.resumed = 0
        self._stem, self.key, self._resume = stem, key, resume
        self._hashing, self._digests = hashing, dict[str, str]()
        self._has_index = False
        self._tensors = shards
        self._overwrite = overwrite
        self._shards: list[ShardFile] = []
        self._places: dict[str, tuple[ShardFile, int]] = {}
        self._staging: Staging | None = None
        self._journal: Journal | None = None

    def __enter__(self) -> CheckpointWriter:
        refuse_existing(self.out, overwrite=self._overwrite)
        try:
            self._staging = Staging(self.out)
            self.folder = self._staging.folder
            done = self._left_by_another()
            self._create_shards(done)
            if self.key:
                self._journal = Journal(self.folder / JOURNAL_NAME, self.key, self._shards)
            self._staging.keep({JOURNAL_NAME, *(shard.path.name for shard in self._shards)})
        except BaseException as error:
            _undisturbed(self._close)
            if self._staging is not None:
                staging = self._staging  # what was there before is somebody's, or can be resumed
                _undisturbed(staging.release if staging.found else staging.discard)
            if isinstance(error, OSError):
                raise _explain(error, self.out) from error
            raise
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
        shard, offset = self._places[name]
        try:
            shard.write(data, offset + start)
        except OSError as error:
            raise _explain(error, self.out) from error

    @property
    def files(self) -> list[ShardFile]:
        """The files, for those that write into them without `write`."""
        return self._shards

    def place(self, name: str) -> tuple[ShardFile, int]:
        """Tell where a tensor goes.

        Args:
            name: a tensor of the output.

        Returns:
            Its file, and the offset of its first byte there.
        """
        return self._places[name]

    def has(self, name: str, start: int, stop: int) -> bool:
        """Tell whether bytes of a tensor are written, by this writer or the one before.

        Args:
            name: a tensor of the output.
            start: the first byte within the tensor.
            stop: one past the last.

        Returns:
            Whether all of them are.
        """
        shard, offset = self._places[name]
        return shard.covers(offset + start, offset + stop)

    def read_back(self) -> dict[str, TensorMeta]:
        """Read the headers of the written shards.

        Returns:
            Tensor name -> what the header says of it.
        """
        return {m.name: m for shard in self._shards for m in read_safetensors_header(shard.path)}

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of every shard, read back from where it was written.

        Returns:
            File name -> digest in hexadecimal.
        """
        given = self._digests
        return {s.path.name: given.get(s.path.name) or s.digest() for s in self._shards}

    def hashed(self, name: str, digest: str) -> None:
        """Take in the SHA-256 of a whole file that another process has read back.

        Args:
            name: of the file.
            digest: in hexadecimal.
        """
        self._digests[name] = digest

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._commit()
                return
        except BaseException as problem:  # noqa: BLE001 it is raised again below
            error = problem
        kept = self._leave(error)
        if isinstance(error, OSError):  # also from whoever added files to the folder
            raise _explain(error, self.out, kept) from error
        if kept and isinstance(error, (OutputError, CheckpointError)):
            raise type(error)(f"{error}{_go_on(self.out)}") from error
        if kind is None:
            raise error

    def _left_by_another(self) -> list[list[list[int]]]:
        """What the journal of an earlier writer says is done; what cannot be used is removed."""
        staging = self._staging
        if staging is None or not staging.found:
            return []
        key, ranges = read_journal(self.folder / JOURNAL_NAME)
        if is_finished(self.folder):
            key = manifest_key(self.folder)
            ranges = [[[0, _size(tensors)]] for tensors in self._tensors]
        if key and not self._resume:
            raise OutputError(
                f"an interrupted merge left {self.folder}; go on with it by --resume, or remove it "
                f"with `omnimerge clean {self.out}`"
            )
        if key and key != self.key:
            raise OutputError(
                f"{self.folder} is of another merge (other recipe, inputs or versions) and cannot "
                f"be resumed; remove it with `omnimerge clean {self.out}`"
            )
        if len(ranges) != len(self._tensors):
            staging.empty()
            return []
        return ranges

    def _create_shards(self, done: Sequence[Sequence[Sequence[int]]]) -> None:
        count = len(self._tensors)
        names = [f"-{i + 1:05d}-of-{count:05d}" if count > 1 else "" for i in range(count)]
        paths = [self.folder / f"{self._stem}{name}.safetensors" for name in names]
        kept = [
            ranges
            if path.is_file() and path.stat().st_size == _size(tensors) >= _end(ranges)
            else []
            for path, tensors, ranges in zip(
                paths, self._tensors, done or [[]] * count, strict=True
            )
        ]
        if done:  # before a file is made anew: at full size it would look as it was promised
            begin_journal(self.folder / JOURNAL_NAME, self.key, kept)
        for path, tensors, ranges in zip(paths, self._tensors, kept, strict=True):
            first = len(safetensors_header(tensors)[0])
            shard = ShardFile(path, tensors, begin_anew=not ranges, hashing=self._hashing)
            self._shards.append(shard)
            self._places |= {name: (shard, place) for name, place in shard.places.items()}
            for start, stop in ranges:
                shard.mark(start, stop)
                self.resumed += max(0, stop - max(start, first))

    def _commit(self) -> None:
        if self._staging is None:
            return
        self.secure()
        for shard in self._shards:
            shard.sync()
        self.write_index()
        refuse_existing(self.out, overwrite=self._overwrite)  # it may have appeared meanwhile
        self._close()
        self._staging.commit()

    def secure(self) -> None:
        """Wait for the disk and the journal: what is written by now is kept, whatever comes.

        Raises:
            OSError: if the disk does not take it.
        """
        if self._journal is not None:
            self._journal.note()

    def write_index(self) -> None:
        """Write the index of several shards, unless it is written; committing does so too."""
        if self._has_index or len(self._shards) < 2:
            return
        weight_map: dict[str, str] = {}
        for shard, tensors in zip(self._shards, self._tensors, strict=True):
            weight_map.update({tensor.name: shard.path.name for tensor in tensors})
        total = sum(tensor.nbytes for tensors in self._tensors for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        path = self.folder / f"{self._stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._has_index = True

    def _leave(self, error: BaseException) -> bool:
        """Keep what can be resumed and is worth it, remove everything else."""
        journal, staging = self._journal, self._staging
        at_fault = isinstance(error, (InputChangedError, NonFiniteError))
        if journal is None or staging is None or at_fault:
            self._discard()
            return False
        tensors = sum(tensor.nbytes for tensors in self._tensors for tensor in tensors)
        headers = sum(shard.size for shard in self._shards) - tensors
        done = sum(shard.nbytes_done for shard in self._shards)
        if isinstance(error, KeyboardInterrupt) and done > headers:
            with contextlib.suppress(OSError):  # the last second's work
                _undisturbed(journal.note)  # wrappers often pass a Ctrl-C on a second time
        if journal.nbytes <= headers or not staging.folder.is_dir():
            self._discard()
            return False
        _undisturbed(self._close)
        staging.release()
        return True

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.stop()
        for shard in self._shards:
            shard.close()

    def _discard(self) -> None:
        _undisturbed(self._close)
        if self._staging is not None:
            _undisturbed(self._staging.discard)


def _end(ranges: Sequence[Sequence[int]]) -> int:
    """The last byte that a journal speaks of."""
    return max((stop for _, stop in ranges), default=0)


def _size(tensors: Sequence[OutputTensor]) -> int:
    """Bytes of a whole file."""
    return len(safetensors_header(tensors)[0]) + sum(tensor.nbytes for tensor in tensors)


def _undisturbed(tidy_up: Callable[[], None]) -> None:
    """Tidy up to the end; a Ctrl-C more does not stop it, the first still ends the run."""
    while True:
        try:
            tidy_up()
        except KeyboardInterrupt:
            continue
        return


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that is not empty, or cannot be replaced.

    Args:
        out: the folder that is to be created.
        overwrite: whether the user allowed to replace it. Only the folder of an earlier merge,
            which holds ``merge_manifest.json``, is ever replaced.

    Raises:
        OutputError: if it exists, is not empty, and may not be replaced; or is a mount point.
    """
    refuse_mounted(out)
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


def refuse_mounted(out: Path) -> None:
    """Refuse an output folder at which a file system is mounted: no other can take its place.

    Args:
        out: the folder that is to be created.

    Raises:
        OutputError: if it is one.
    """
    if os.path.ismount(os.path.realpath(out)):
        raise OutputError(
            f"a file system is mounted at {out}, so that nothing can take its place; give a folder "
            f"in it, as {out / 'merged'}"
        )


def _explain(error: OSError, out: Path, kept: bool = False) -> OutputError:
    """Say what went wrong in terms of the folder the user asked for."""
    more = _go_on(out) if kept else ""
    if error.errno == errno.EFBIG:
        return OutputError(
            f"a file of {out} would be larger than this process or file system allows "
            f"({error.strerror}); raise the limit (`ulimit -f`), or give a smaller "
            f"max_shard_size{more}"
        )
    if error.errno in DISK_FULL:
        return OutputError(
            f"no space left for {out} ({error.strerror}); free some, or give a folder elsewhere"
            f"{more}"
        )
    return OutputError(f"cannot write {out}: {error.strerror or error}{more}")


def _go_on(out: Path) -> str:
    return f"; what is done is kept: go on with --resume, or remove it: `omnimerge clean {out}`"
