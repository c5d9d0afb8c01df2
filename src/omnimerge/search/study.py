"""A folder of answers, locked while a search works in it; it keeps the answers of one setting."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from omnimerge.errors import SearchError
from omnimerge.search.result import RESULT_NAME
from omnimerge.search.store import AnswerStore, write_atomically

SETTINGS_NAME = "settings.json"
RESPONSES_NAME = "responses"
HELDOUT_NAME = "heldout"
CHECKS_NAME = "checks"

MEDIA_NAME = "media"

_LOCK_NAME = ".lock"


class Study:
    """A folder of answers, locked while it is open.

    Use as a context manager. `settings` is everything that an answer depends on (recipe, prompts,
    lengths, seed); a folder keeps the answers of one setting. The grid is no part of it, so that a
    finer grid or another criterion reuses what is there.

    Args:
        folder: the folder.
        settings: everything that an answer depends on, as JSON values.
        ids: the prompts' ids, in order.
        overwrite: whether answers that are there are thrown away.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        ids: Sequence[str],
        *,
        overwrite: bool = False,
    ) -> None:
        self.folder = folder
        self.store = AnswerStore(folder / RESPONSES_NAME, ids)
        self._settings = json.loads(json.dumps(settings))
        self._overwrite = overwrite
        self._lock: int | None = None

    def __enter__(self) -> Study:
        self._acquire()
        try:
            self._check_settings()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _acquire(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise SearchError(
                f"cannot use {self.folder} ({error.strerror}); choose another output folder"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            busy = error.errno in (errno.EAGAIN, errno.EACCES)
            reason = "another search is writing into it" if busy else str(error.strerror)
            raise SearchError(
                f"cannot lock {self.folder}: {reason}; wait for it or choose another folder"
            ) from error
        self._lock = lock

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # which frees the lock; the file stays, for the next one
            self._lock = None

    def _check_settings(self) -> None:
        """Refuse a folder of other settings or other files; record the settings in a new one."""
        file = self.folder / SETTINGS_NAME
        if file.exists():
            changed = self._changed(file)
            if changed and not self._overwrite and self.store.any():
                raise SearchError(
                    f"{self.folder} holds a search with other settings ({'; '.join(changed)}); "
                    "choose another folder, or overwrite it"
                )
        elif not self._overwrite:
            refuse_foreign(self.folder)
        if self._overwrite:
            self.store.clear()
            for name in (HELDOUT_NAME, CHECKS_NAME):
                AnswerStore(self.folder / name, ()).clear()
            (self.folder / RESULT_NAME).unlink(missing_ok=True)
        write_atomically(file, json.dumps(self._settings, indent=1) + "\n")

    def _changed(self, file: Path) -> list[str]:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return [f"{file.name} cannot be read"]
        if not isinstance(before, dict):
            return [f"{file.name} cannot be read"]
        keys = [
            key
            for key in {**before, **self._settings}
            if before.get(key) != self._settings.get(key)
        ]
        return [
            f"{key}: {_short(before.get(key))} there, {_short(self._settings.get(key))} here"
            for key in keys
        ]


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder that holds files, and no search.

    Args:
        folder: the folder; it need not exist.

    Raises:
        SearchError: naming one of the files.
    """
    if not folder.is_dir() or (folder / SETTINGS_NAME).exists():
        return
    ours = (_LOCK_NAME, MEDIA_NAME)  # images of a data set are unpacked before the search begins
    foreign = sorted(file.name for file in folder.iterdir() if file.name not in ours)
    if foreign:
        raise SearchError(
            f"{folder} is not empty and holds no search (it has {foreign[0]!r}); choose an empty "
            "folder, or overwrite it"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
