"""Files that stay open between uses, of which a process may have few: 1,024, or 256, as a rule.

Opening one for every read would cost a question to the server on network storage; keeping all of a
large merge open, some hundred shards of every model, would be more than the system allows.
"""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MOST = 512
# Whoever lets go of a checkpoint may be in the middle of these lines: its `__del__` comes here.
_lock = threading.RLock()
_open: dict[OpenFile, None] = {}  # the one that was used last comes last


class OpenFile:
    """A file that is opened when it is used, and closed when many others have been used since.

    Args:
        path: the file.
        flags: of `os.open`; may not make or truncate it, since it may be opened again.
        before_closing: called with the descriptor when it is closed for others; may not raise.
    """

    def __init__(
        self,
        path: Path,
        flags: int = os.O_RDONLY,
        before_closing: Callable[[int], object] | None = None,
    ) -> None:
        self._path, self._flags, self._before_closing = path, flags, before_closing
        self._descriptor, self._users = -1, 0

    @contextmanager
    def used(self) -> Iterator[int]:
        """Hold the file open while the block runs. Safe from several threads.

        Yields:
            Its descriptor.

        Raises:
            OSError: if it cannot be opened.
        """
        spare: list[tuple[OpenFile, int]] = []
        with _lock:
            if self._descriptor < 0:
                self._descriptor = os.open(self._path, self._flags)
                spare = _taken_from_others()
            _open.pop(self, None)
            _open[self] = None
            self._users += 1
        try:
            for other, descriptor in spare:  # outside of the lock: the disk may take its time
                other._end(descriptor)
            yield self._descriptor
        finally:
            with _lock:
                self._users -= 1

    def close(self) -> None:
        """Close the file. Using it afterwards opens it again."""
        with _lock:
            _open.pop(self, None)
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _end(self, descriptor: int) -> None:
        try:
            if self._before_closing:
                self._before_closing(descriptor)
        finally:
            os.close(descriptor)


def _taken_from_others() -> list[tuple[OpenFile, int]]:
    """Make room for one more: the descriptors of what was used longest ago, and is not now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MOST if soft == resource.RLIM_INFINITY else min(_MOST, soft // 2)
    taken = []
    for each in list(_open):
        if len(_open) < limit:
            break
        if not each._users:
            del _open[each]
            taken.append((each, each._descriptor))
            each._descriptor = -1
    return taken
