"""What lies in folders of the benchmark, gathered by line and preset for the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omnimerge.bench import experiments, results
from omnimerge.bench.analysis import Analysis, read_analysis
from omnimerge.bench.experiments.result import Experiment, combined
from omnimerge.bench.line import BenchError
from omnimerge.bench.page import Board

_LARGEST = 1 << 26  # bytes; files of ours are smaller


def find_boards(folders: Sequence[Path], scored: Sequence[Board] = ()) -> list[Board]:
    """Read the results, analyses and experiments in folders, their subfolders included.

    Args:
        folders: of one or more runs; files may be given, too.
        scored: boards with the scores of lines, which analyses and experiments are added to.

    Returns:
        One board per line and preset, the one without a line last.

    Raises:
        BenchError: if a folder is not there, a seed is there twice, or there is nothing to show.
    """
    found: dict[tuple[str, str], list[Experiment]] = {}
    analyses: dict[tuple[str, str], list[Analysis]] = {}
    for file, data in json_files(folders):
        if data.get("kind") == "experiment":
            experiment = experiments.read(file)
            found.setdefault((experiment.line, experiment.preset), []).append(experiment)
        elif data.get("kind") == "task vectors":
            analyses.setdefault(_built_above(file), []).append(read_analysis(file))
    boards = {(board.line, board.preset): board for board in scored}
    for key in (*found, *analyses):
        boards.setdefault(key, Board(*key))
    if not boards:
        shown = ", ".join(map(str, folders))
        raise BenchError(
            f"{shown}: no results, analyses or experiments in there; `omnimerge bench run`, "
            "`analyze` and `experiment` write them"
        )
    filled = [
        replace(
            board,
            analyses=tuple(analyses.get(key, ())),
            experiments=tuple(_by_experiment(found.get(key, []))),
        )
        for key, board in boards.items()
    ]
    return sorted(filled, key=lambda board: not board.line)


def json_files(folders: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Read the JSON files in folders, their subfolders included, that hold a mapping.

    Args:
        folders: may overlap or repeat; files may be given, too.

    Yields:
        Each file once, by its real path, and what it holds.

    Raises:
        BenchError: if a folder is not there.
    """
    files: dict[Path, None] = {}
    for folder in folders:
        if not folder.exists():
            raise BenchError(f"{folder} is not there")
        below = sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]
        files |= dict.fromkeys(file.resolve() for file in below if file.is_file())
    for file in files:
        try:
            small = file.stat().st_size <= _LARGEST
            data = json.loads(file.read_text(encoding="utf-8")) if small else None
        except (OSError, ValueError):
            continue
        if isinstance(data, dict):
            yield file, data


def _built_above(file: Path) -> tuple[str, str]:
    """Line and preset of the built folder that a file lies in; empty if it lies in none."""
    for folder in file.parents:
        mark = folder / results.BUILD_NAME
        if mark.is_file():
            try:
                built = results.read(results.Build, mark)
            except BenchError:  # another tool's
                continue
            return built.line, built.preset
    return "", ""


def _by_experiment(found: Sequence[Experiment]) -> list[Experiment]:
    """Means over the seeds of a line, in the order in which experiments are listed."""
    known = experiments.names()
    order = [*known, *sorted({each.name for each in found} - set(known))]
    means = []
    for name in order:
        same = [each for each in found if each.name == name]
        outcome: Callable[[Experiment], Sequence[str]] | None = None
        if name in known and len(same) > 1:
            outcome = experiments.get(name).outcome
        if same and same[0].line:
            means.append(combined(same, outcome))
        else:  # recipes of one's own have nothing to do with each other
            means += same
    return means
