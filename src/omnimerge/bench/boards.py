"""What lies in folders of the benchmark, gathered line by line for the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omnimerge.bench import experiments
from omnimerge.bench.analysis import Analysis, read_analysis
from omnimerge.bench.experiments.result import Experiment, combined, read_experiment
from omnimerge.bench.line import BenchError
from omnimerge.bench.page import Board

_TASK_VECTORS = "Task vectors"


def find_boards(folders: Sequence[Path], scored: Sequence[Board] = ()) -> list[Board]:
    """Read the results, analyses and experiments in folders, their subfolders included.

    Args:
        folders: of one or more runs; files may be given, too.
        scored: boards with the scores of lines, which analyses and experiments are added to.

    Returns:
        One board per line, those without a line last.

    Raises:
        BenchError: if a folder is not there, or there is nothing to show.
    """
    files = [file for folder in folders for file in _files(folder)]
    found: dict[str, list[Experiment]] = {}
    analyses: dict[str, list[Analysis]] = {}
    for file, kind in files:
        if kind == "experiment":
            experiment = read_experiment(file)
            found.setdefault(experiment.line, []).append(experiment)
        elif kind == "task vectors":
            analyses.setdefault(_line_of(file), []).append(read_analysis(file))
    boards = {board.name: board for board in scored}
    for name in (*found, *analyses):
        boards.setdefault(name, Board(name or _TASK_VECTORS))
    for name, board in boards.items():
        boards[name] = replace(
            board,
            analyses=tuple(analyses.get(name, ())),
            experiments=tuple(_by_experiment(found.get(name, []))),
        )
    if not boards:
        shown = ", ".join(map(str, folders))
        raise BenchError(
            f"{shown}: no results, analyses or experiments in there; `omnimerge bench run`, "
            "`analyze` and `experiment` write them"
        )
    return sorted(boards.values(), key=lambda board: board.name == _TASK_VECTORS)


def _files(folder: Path) -> list[tuple[Path, str]]:
    """JSON files that say what kind of a result they are."""
    if not folder.exists():
        raise BenchError(f"{folder} is not there")
    files = sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]
    kinds = ((file, _kind(file)) for file in files)
    return [(file, kind) for file, kind in kinds if kind]


def _kind(file: Path) -> str:
    if not file.is_file() or file.stat().st_size > 1 << 26:
        return ""
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    kind = data.get("kind") if isinstance(data, dict) else None
    return kind if isinstance(kind, str) else ""


def _line_of(file: Path) -> str:
    """The line that a built folder above a file belongs to."""
    for folder in file.resolve().parents:
        mark = folder / "build.json"
        if mark.is_file():
            try:
                return str(json.loads(mark.read_text(encoding="utf-8"))["line"])
            except (OSError, ValueError, KeyError, TypeError):
                return ""
    return ""


def _by_experiment(found: Sequence[Experiment]) -> list[Experiment]:
    """Means over the seeds, in the order in which experiments are listed."""
    known = experiments.names()
    order = [*known, *sorted({each.name for each in found} - set(known))]
    means = []
    for name in order:
        same = [each for each in found if each.name == name]
        if same:
            outcome: Callable[[Experiment], Sequence[str]] | None = None
            if name in known:
                outcome = experiments.get(name).outcome
            means.append(combined(same, outcome))
    return means
