"""The lock of an output: a file beside it, which keeps processes of other machines out too."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from pathlib import Path

from omnimerge.errors import OutputError

_TEXT = re.compile(rb"[0-9a-f]{0,64}")


class Lock:
    """The lock of an output, a file beside it that is there as long as a process holds it.

    A file of its own, open for writing: network file systems do not lock folders, and what is open
    for reading only to this machine's processes. While an earlier output is replaced, it holds the
    key of the new one, by which the two are told apart.

    Args:
        out: the output.
        file: the lock.

    Raises:
        OutputError: if another process holds it, or something else is in the place.
        OSError: if the file cannot be made.
    """

    def __init__(self, out: Path, file: Path) -> None:
        self.file = file
        while True:
            self._descriptor = self._open()
            try:
                if not _flock(self._descriptor):
                    raise OutputError(
                        f"another process is writing {out}; wait for it, or give another folder"
                    )
                if not _is_lock(self._descriptor):
                    raise in_the_way(self.file)
                if self._has_its_name():
                    return
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)  # who held it was done just now, and removed it

    def note(self, key: str) -> None:
        """Put a key into the file, in the place of another.

        Args:
            key: in hexadecimal; may be empty.
        """
        with contextlib.suppress(OSError):  # without it nothing is lost, but more is kept
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, key.encode(), 0)
            os.fsync(self._descriptor)

    def release(self, *, remove: bool = True) -> None:
        """Remove the file, then let go of it; may be called again.

        Args:
            remove: else the file stays, with what was noted in it.
        """
        if self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            if remove and os.path.samestat(os.fstat(self._descriptor), self.file.stat()):
                self.file.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def _open(self) -> int:
        try:
            return os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ELOOP):
                raise
            raise in_the_way(self.file) from error

    def _has_its_name(self) -> bool:
        again = self._open()  # network file systems answer a stat from memory
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.fstat(again))
        finally:
            os.close(again)


def is_held(lock: Path) -> bool:
    """Tell whether a process holds a lock.

    Args:
        lock: the file, which need not exist.

    Returns:
        False as well if it cannot be opened.
    """
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not _flock(descriptor)
    finally:
        os.close(descriptor)


def note_of(lock: Path) -> str | None:
    """Read what a lock that nobody holds says.

    Args:
        lock: the file, which need not exist.

    Returns:
        The key in it; None if there is no lock of ours.
    """
    if lock.is_symlink() or not lock.is_file():
        return None
    try:
        with lock.open("rb") as stream:
            text = stream.read(1000)
    except OSError:
        return None
    return text.decode() if _TEXT.fullmatch(text) else None


def in_the_way(path: Path) -> OutputError:
    """Say that what is in a place of ours is somebody's.

    Args:
        path: the place.

    Returns:
        The error to raise.
    """
    return OutputError(
        f"{path} is in the way and is nothing that a merge left; remove it, or give another folder"
    )


def _is_lock(descriptor: int) -> bool:
    """Whether an open file is what a lock looks like."""
    regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    return regular and bool(_TEXT.fullmatch(os.pread(descriptor, 1000, 0)))


def _flock(descriptor: int) -> bool:
    """Lock a file; True as well where the file system has no locks, False if another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True
