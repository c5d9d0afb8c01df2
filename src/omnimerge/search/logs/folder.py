"""A folder as a log: the newest run of every task that lmms-eval logged into it, or one file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from omnimerge.errors import SearchError
from omnimerge.search.logs.file import open_file
from omnimerge.search.logs.lmms_eval import KIND
from omnimerge.search.logs.log import Log

# 20260218_101500_samples_mme.jsonl; the other order was written for a while.
_NAMES = (
    re.compile(r"(?P<date>\d{8}_\d{6})_samples_(?P<task>.+)\.jsonl"),
    re.compile(r"samples_(?P<task>.+)_(?P<date>\d{8}_\d{6}|\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl"),
)
_SUFFIXES = (".json", ".jsonl", ".xlsx", ".tsv", ".csv")
_NO_LOGS = ("results.json", "status.json", "settings.json", "search.json")


def open_log(path: str | Path, *, filtered: bool = False) -> Log:
    """Read the answers that a harness logged at one coefficient.

    A folder is searched for lmms-eval's samples, also in the folders inside it. Of every task the
    newest run is taken, by the date in the file's name; with several tasks the ids are
    ``task/id``. A folder without such files must hold exactly one log, or lmms-eval's
    ``<task>.json`` files of one run (0.1 to 0.2.3).

    Args:
        path: a file or a folder.
        filtered: whether to take what a task's filter kept of an answer (lmms-eval's
            ``filtered_resps``) instead of all that the model said.

    Returns:
        The answers.

    Raises:
        SearchError: if it cannot be read, is no log, or is more than one.
    """
    path = Path(path)
    if not path.is_dir():
        return open_file(path, filtered=filtered)
    tasks, notes = _newest(path)
    if tasks:
        logs = {task: open_file(file, filtered=filtered) for task, file in sorted(tasks.items())}
        return _together(path, logs, notes)
    return _plain(path, filtered)


def _newest(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The newest file of every task."""
    runs: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.rglob("*.jsonl")):
        found = next(filter(None, (name.fullmatch(file.name) for name in _NAMES)), None)
        if found is not None:
            runs.setdefault(found["task"], {})[f"{found['date']} {file}"] = file
    files = [file for dates in runs.values() for file in dates.values()]
    if elsewhere := [file for file in files if file.parent != files[0].parent]:
        raise SearchError(
            f"{folder} holds the logs of two models ({files[0].parent.relative_to(folder)}, "
            f"{elsewhere[0].parent.relative_to(folder)}); give the folder of one"
        )
    newest = {task: dates[max(dates)] for task, dates in runs.items()}
    return newest, [
        f"{newest[task]}: taken as the newest of {len(dates)} runs"
        for task, dates in runs.items()
        if len(dates) > 1
    ]


def _plain(folder: Path, filtered: bool) -> Log:
    """The one log that lies in a folder, or the tasks of one run of an early lmms-eval."""
    files = [file for file in _visible(folder) if file.name not in _NO_LOGS]
    if len(files) == 1:
        return open_file(files[0], filtered=filtered)
    if not files:
        raise SearchError(
            f"{folder} holds no log; give a file, or the folder that the files are in"
        )
    if all(file.suffix == ".json" for file in files):
        with suppress(SearchError):  # then they are not all logs
            logs = {file.stem: open_file(file, filtered=filtered) for file in files}
            if all(log.kind == KIND for log in logs.values()):
                return _together(folder, logs, [])
    names = ", ".join(file.name for file in files[:4])
    raise SearchError(f"{folder} holds several files ({names}); give the one to read")


def _visible(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        hidden = file.name.startswith((".", "~$"))  # "~$" is a workbook open in Excel
        if file.suffix.lower() in _SUFFIXES and not hidden and file.is_file():
            yield file


def _together(folder: Path, logs: dict[str, Log], notes: list[str]) -> Log:
    told = tuple(notes) + tuple(note for log in logs.values() for note in log.notes)
    if len(logs) == 1:
        (log,) = logs.values()
        return Log(log.path, log.kind, log.answers, log.asked, told)
    return Log(
        folder,
        f"{next(iter(logs.values())).kind}, tasks {', '.join(logs)}",
        {f"{task}/{i}": answer for task, log in logs.items() for i, answer in log.answers.items()},
        {f"{task}/{i}": asked for task, log in logs.items() for i, asked in log.asked.items()},
        told,
    )
