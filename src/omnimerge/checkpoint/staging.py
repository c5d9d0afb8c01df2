"""The hidden folder beside an output in which it grows, and what dead processes left of such.

It is ``.NAME.omnimerge``, and holds a journal, at first an empty one, until it is complete: a
folder of this name without one is not ours. It gets its final name by one rename; one that replaces
an earlier output is exchanged with it in one step where the system can. A process that is at it
holds the lock ``.NAME.omnimerge-lock``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from omnimerge.checkpoint.journal import journal_key, sync_folder
from omnimerge.checkpoint.links import real_path
from omnimerge.checkpoint.lock import Lock, in_the_way, is_held, note_of
from omnimerge.checkpoint.shard import DISK_FULL
from omnimerge.checkpoint.small_file import read_json
from omnimerge.errors import CheckpointError, OutputError

MANIFEST_NAME = "merge_manifest.json"
"""The file that marks a folder as the output of a merge."""

JOURNAL_NAME = "omnimerge.journal"

_SUFFIX, _OLD_SUFFIX, _LOCK_SUFFIX = ".omnimerge", ".omnimerge-old", ".omnimerge-lock"
_PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]+:/")  # what a path makes of a URL
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class Leftover:
    """What a process which is gone left beside an output.

    Attributes:
        folder: where it is; or the lock, if that is all.
        out: the output that it was to become, or was.
        key: of the merge that wrote it; empty if that is not known.
        nbytes: what it takes on disk.
        begun: whether its journal says that a merge was not done with it.
        resumable: whether a merge can go on with it, or has but to name it.
        replaced: whether it is an earlier output that was replaced, or was about to be.
    """

    folder: Path
    out: Path
    key: str
    nbytes: int
    begun: bool
    resumable: bool
    replaced: bool


class Staging:
    """The hidden folder of one output, locked.

    Args:
        out: the output.

    Attributes:
        folder: the hidden folder.
        found: whether it was there already, left by a process that is gone.

    Raises:
        OutputError: if another process writes this output, or something else is in the place.
        OSError: if the folder cannot be made.
    """

    def __init__(self, out: Path) -> None:
        if _PROTOCOL.match(str(out)) and not Path(out.parts[0]).is_dir():
            raise OutputError(
                f"cannot write to a URL ({out.parts[0]}//...); give a folder, and upload it then"
            )
        self.out = out
        self.folder = _beside(out, _SUFFIX)
        self._made = _make_folders(out.parent)
        self._lock = Lock(out, _beside(out, _LOCK_SUFFIX))
        self._new_key = note_of(self._lock.file) or ""
        try:
            if self._holds_earlier():
                _remove(self.folder)
            self._new_key = ""
            self._lock.note("")
            try:
                self.folder.mkdir()
                self.found = False
            except FileExistsError:
                self.found = True
            if self.found and not _is_ours(self.folder):
                raise in_the_way(self.folder)
            (self.folder / JOURNAL_NAME).touch()
        except BaseException:
            self.release()
            raise

    def empty(self) -> None:
        """Throw away what is in the folder."""
        self.keep({JOURNAL_NAME})
        self.found = False

    def keep(self, names: Collection[str]) -> None:
        """Throw away what is in the folder, but for some of it.

        Args:
            names: of what stays.
        """
        _clear(self.folder, names)

    def commit(self) -> None:
        """Give the folder its final name, in place of an earlier output if there is one.

        All of it is on disk before it gets the name, and the earlier output is removed when the
        disk knows of the new one.

        Raises:
            OSError: if the disk does not take it; the folder is as it was then.
        """
        _sync_tree(self.folder)
        (self.folder / JOURNAL_NAME).unlink(missing_ok=True)
        sync_folder(self.folder)
        earlier = None
        if self.out.exists():
            self._new_key = manifest_key(self.folder)
            self._lock.note(self._new_key)
            earlier = _exchange(self.folder, self.out)
        else:
            self.folder.rename(self.out)
        sync_folder(self.out.parent)
        if earlier is not None:
            with contextlib.suppress(OSError):  # `clean` removes what stays
                _remove(earlier)
        self.release()

    def discard(self) -> None:
        """Remove the folder, and those above it that were made for it and are empty."""
        with contextlib.suppress(OSError):
            _remove(self.folder)
        self.release()
        with contextlib.suppress(OSError):  # a folder that is not empty is not ours any more
            for folder in self._made:
                folder.rmdir()

    def release(self) -> None:
        """Let go of the lock; the folder stays, and the lock too where it tells what that is."""
        self._lock.release(remove=not self._holds_earlier())

    def _holds_earlier(self) -> bool:
        """Whether the folder is an earlier output, which a new one has taken the place of."""
        noted = bool(self._new_key) and self._new_key == manifest_key(self.out)
        return noted and is_finished(self.folder)


def leftovers(path: Path) -> list[Leftover]:
    """Find what dead processes left of an output, or in a folder of outputs.

    Args:
        path: the output, which need not exist, or a folder.

    Returns:
        What is there; folders that are being written into are left out.
    """
    hidden = [_beside(final_place(path), _SUFFIX)]
    for entry in sorted(path.glob(".?*")) if path.is_dir() else ():
        for suffix in (_SUFFIX, _OLD_SUFFIX, _LOCK_SUFFIX):
            name = entry.name.removesuffix(suffix)
            if name != entry.name and name.strip("."):
                hidden.append(entry.with_name(name + _SUFFIX))
    return [each for folder in dict.fromkeys(hidden) for each in _left_at(folder)]


def refuse_full_disk(out: Path, needed: int) -> None:
    """Refuse an output that there is no room for, before the work and not after it.

    Args:
        out: the folder that is to be created; what dead processes left of it counts as free.
        needed: bytes.

    Raises:
        OutputError: if the file system says that it has less. One that is read-only, or does not
            know, says so when it is written to.
    """
    parent = next((p for p in out.absolute().parents if p.is_dir()), Path("/"))
    try:
        told = os.statvfs(parent)
        if told.f_flag & os.ST_RDONLY or not told.f_blocks:
            return
        free = shutil.disk_usage(parent).free + sum(each.nbytes for each in leftovers(out))
    except OSError:
        return
    if free < needed:
        raise OutputError(
            f"no space left for {out}: {needed:,} bytes are needed and {free:,} are "
            "free; free some, or give a folder elsewhere"
        )


def left_of(out: Path) -> list[Leftover]:
    """Find what dead processes left of an output.

    Args:
        out: the output, which need not exist.

    Returns:
        What is there; nothing if it is being written into.
    """
    return _left_at(_beside(final_place(out), _SUFFIX))


def final_place(out: Path) -> Path:
    """Return where an output appears.

    Args:
        out: what the user wrote.

    Returns:
        What a link leads to; and a path without dots, which the system does not rename to, and
        which would have folders made that it leads back from.
    """
    return real_path(out) if out.is_symlink() or not out.name or ".." in out.parts else out


def _left_at(hidden: Path) -> list[Leftover]:
    """What was left of one output."""
    out = hidden.with_name(hidden.name[1:].removesuffix(_SUFFIX))
    old, lock = _beside(out, _OLD_SUFFIX), _beside(out, _LOCK_SUFFIX)
    if is_held(lock):
        return []
    new_key = note_of(lock)
    found = []
    for folder in (hidden, old):
        if not _is_ours(folder):
            continue
        nbytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        begun = folder == hidden and _is_begun(folder)
        replaced = folder == old or (not begun and bool(new_key) and manifest_key(out) == new_key)
        resumable = begun or (not replaced and is_finished(folder))
        key = journal_key(folder / JOURNAL_NAME) if begun else manifest_key(folder)
        found.append(Leftover(folder, out, key, nbytes, begun, resumable, replaced))
    if not found and new_key is not None:
        found.append(Leftover(lock, out, "", 0, begun=False, resumable=False, replaced=False))
    return found


def clean(leftover: Leftover) -> str:
    """Remove a leftover; an earlier output whose place is empty is put back instead.

    Args:
        leftover: one of `leftovers`.

    Returns:
        What was done: ``removed`` or ``restored``.

    Raises:
        OutputError: if it cannot be removed, or is in use by now.
    """
    lock = None
    try:
        try:
            lock = Lock(leftover.out, _beside(leftover.out, _LOCK_SUFFIX))
        except OSError as error:
            if error.errno not in DISK_FULL:  # then no other process can take it either
                raise
        if leftover.replaced and not leftover.out.exists():
            leftover.folder.rename(leftover.out)
            return "restored"
        if lock is None or leftover.folder != lock.file:
            _remove(leftover.folder)
    except OSError as error:
        raise OutputError(f"cannot remove {leftover.folder}: {error.strerror}") from error
    finally:
        if lock is not None:
            lock.release()
    return "removed"


def _beside(out: Path, suffix: str) -> Path:
    """The hidden name of an output, which may be written as ``.`` or ``..``."""
    place = real_path(out) if out.name in ("", "..") else out
    if not place.name:
        raise OutputError(f"{out} is the root of the file system; give a folder in it")
    return place.with_name(f".{place.name}{suffix}")


def _is_ours(folder: Path) -> bool:
    """Whether there is a folder that a merge made: it is marked, complete, or empty."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    marked = any((folder / name).is_file() for name in (JOURNAL_NAME, MANIFEST_NAME))
    return marked or not any(folder.iterdir())


def is_finished(folder: Path) -> bool:
    """Tell whether a hidden folder is complete and lacks but its name.

    Args:
        folder: the hidden folder.

    Returns:
        Whether its journal is gone, or not begun again, and its manifest has a key.
    """
    return not _is_begun(folder) and bool(manifest_key(folder))


def _is_begun(folder: Path) -> bool:
    journal = folder / JOURNAL_NAME
    return journal.is_file() and journal.stat().st_size > 0


def manifest_key(folder: Path) -> str:
    """Return the key of the merge that wrote a folder.

    Args:
        folder: any folder.

    Returns:
        The key that its manifest has; empty if it was not written by a merge.
    """
    try:
        return str(read_json(folder / MANIFEST_NAME).get("key", ""))
    except CheckpointError:
        return ""


def _remove(folder: Path) -> None:
    """Remove a folder of ours; after a kill the rest is known for ours, and for unusable."""
    mark = folder / JOURNAL_NAME
    with contextlib.suppress(OSError):  # a full disk is no reason to keep it
        mark.touch()
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        os.truncate(mark, 0)
    _clear(folder, {JOURNAL_NAME})
    shutil.rmtree(folder)


def _clear(folder: Path, kept: Collection[str]) -> None:
    for entry in folder.iterdir():
        if entry.name not in kept:
            inside = entry.is_dir() and not entry.is_symlink()
            shutil.rmtree(entry) if inside else entry.unlink()


def _exchange(new: Path, out: Path) -> Path:
    """Put a folder in the place of another; return where that one is now."""
    try:
        _renameat2(new, out)
        return new
    except (OSError, AttributeError):  # not this system, or not this file system
        pass
    old = _beside(out, _OLD_SUFFIX)
    if os.path.lexists(old):
        if not _is_ours(old):
            raise in_the_way(old)
        _remove(old)
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise
    return old


def _renameat2(one: Path, other: Path) -> None:
    """Exchange two paths in one step (Linux).

    Args:
        one: the one.
        other: the other.

    Raises:
        OSError: if the file system cannot.
        AttributeError: if the C library cannot.
    """
    call = ctypes.CDLL(None, use_errno=True).renameat2
    paths = (os.fsencode(one), os.fsencode(other))
    if call(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _make_folders(folder: Path) -> list[Path]:
    """Create a folder and its parents; return those that were created, the deepest first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
    return missing


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))
