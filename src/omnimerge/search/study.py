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

CHOSEN_NAME = "recipe.yaml"
MAPPING_NAME = "mapping.json"
REPORT_NAME = "report.html"
RESULTS = (RESULT_NAME, CHOSEN_NAME, MAPPING_NAME, REPORT_NAME)
"""What is made from the answers."""

_LOCK_NAME = ".lock"
_VERSIONS = "versions"
_DIGESTS = {
    "prompts": "other prompts, or another --sample or --seed",
    "target": "another checkpoint, or changed files",
    "models": "other checkpoints, or changed files",
    "base": "another checkpoint, or changed files",
}


class Study:
    """A folder of answers, locked while it is open.

    Use as a context manager. `settings` is everything that an answer depends on (recipe, prompts,
    lengths, seed); a folder keeps the answers of one setting. The grid is no part of it, so that a
    finer grid or another criterion reuses what is there. Answers of other versions are reused too,
    with a note.

    Args:
        folder: the folder.
        settings: everything that an answer depends on, as JSON values.
        ids: the prompts' ids, in order.
        versions: of what computes the answers.
        overwrite: whether answers that are there are thrown away.

    Attributes:
        store: the answers.
        notes: what the user should know of answers that are there.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        ids: Sequence[str],
        *,
        versions: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.notes: list[str] = []
        self.folder = folder
        self.store = AnswerStore(folder / RESPONSES_NAME, ids)
        self._settings = json.loads(json.dumps(settings))
        self._versions = dict(versions or {})
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
        versions = self._versions
        if file.exists():
            before = _read(file)
            kept = before.pop(_VERSIONS, None)
            changed = differences(before, self._settings) if before else ["it cannot be read"]
            if changed and not self._overwrite and self.store.any():
                raise SearchError(
                    f"{self.folder} holds a search with other settings ({'; '.join(changed)}); "
                    "choose another folder, or overwrite it"
                )
            if changed or self._overwrite:
                self._clear()
            elif isinstance(kept, dict) and self.store.any():
                versions = kept
                self._compare(kept)
        elif self._overwrite:
            self._clear(())  # other files of that name may be the user's
        else:
            refuse_foreign(self.folder)
        settings = {**self._settings, _VERSIONS: versions}
        write_atomically(file, json.dumps(settings, indent=1) + "\n")

    def _clear(self, results: Sequence[str] = RESULTS) -> None:
        """Delete answers, and what was made from them."""
        for name in (RESPONSES_NAME, HELDOUT_NAME, CHECKS_NAME):
            AnswerStore(self.folder / name, ()).clear()
        for name in results:
            (self.folder / name).unlink(missing_ok=True)

    def _compare(self, kept: Mapping[str, str]) -> None:
        others = [
            f"{name} {version} (now {self._versions.get(name, 'none')})"
            for name, version in kept.items()
            if self._versions.get(name) != version
        ]
        if others:
            self.notes.append(f"the first answers in this folder are of {', '.join(others)}")


def refuse_foreign(folder: Path, marker: str = SETTINGS_NAME, what: str = "search") -> None:
    """Refuse a folder that holds files, and no search.

    Args:
        folder: the folder; it need not exist.
        marker: the file that tells a folder of ours.
        what: what such a folder holds.

    Raises:
        SearchError: naming one of the files.
    """
    if not folder.is_dir() or (folder / marker).exists():
        return
    ours = (_LOCK_NAME, MEDIA_NAME)  # images of a data set are unpacked before the search begins
    foreign = sorted(file.name for file in folder.iterdir() if file.name not in ours)
    if foreign:
        hint = ", or overwrite it" if marker == SETTINGS_NAME else ""
        raise SearchError(
            f"{folder} is not empty and holds no {what} (it has {foreign[0]!r}); choose an empty "
            f"folder{hint}"
        )


def _read(file: Path) -> dict[str, Any]:
    """The settings; none where they cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def differences(before: Any, here: Any, key: str = "") -> list[str]:
    """Tell where two settings differ, down to the single values.

    Args:
        before: JSON values.
        here: others.
        key: what they are called.

    Returns:
        One text for each difference; none where they are equal.
    """
    if before == here:
        return []
    if key in _DIGESTS:
        return [f"{key}: {_DIGESTS[key]}"]
    if isinstance(before, list) and isinstance(here, list):
        before, here = dict(enumerate(before)), dict(enumerate(here))
    if isinstance(before, dict) and isinstance(here, dict):
        return [
            told
            for name in {**before, **here}
            for told in differences(
                before.get(name), here.get(name), f"{key}.{name}" if key else str(name)
            )
        ]
    return [f"{key}: {_short(before)} there, {_short(here)} here"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
