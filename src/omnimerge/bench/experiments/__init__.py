"""The findings of the OptMerge paper, repeated on the miniature lines: one file per finding."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

from omnimerge.bench import lines, results
from omnimerge.bench.experiments.noise import QUESTIONS
from omnimerge.bench.experiments.result import Experiment, read_experiment
from omnimerge.bench.line import BenchError, Line, Report
from omnimerge.errors import suggestion

ABOUT = {
    "norm-growth": "norm of the merged task vector by iteration: WUDI under Adam, OptMerge",
    "ablation": "WUDI, + SGD, + mean as the start, + low rank = OptMerge's LoRA variant",
    "rank-ratio": "OptMerge by the share of singular directions that it keeps",
    "distributions": "how the entries of task vectors are spread",
    "overtraining": "merges of experts that were trained for shorter and for longer",
}
"""What each experiment, in the file of its name, is about."""
RECIPE_ONLY = ("norm-growth", "distributions")
"""Experiments that look at weights alone: any line does, and any recipe with a base."""


def names() -> list[str]:
    """List the experiments.

    Returns:
        What `get` takes.
    """
    return list(ABOUT)


def get(name: str) -> ModuleType:
    """Return the module of an experiment: its `NAME`, `run` and `outcome`.

    Args:
        name: one of `names`.

    Returns:
        The module.

    Raises:
        BenchError: if there is none of that name.
    """
    if name not in ABOUT:
        known = ", ".join(ABOUT)
        raise BenchError(f"unknown experiment {name!r}{suggestion(name, ABOUT)}; known: {known}")
    return import_module(f"omnimerge.bench.experiments.{name.replace('-', '_')}")


def read(file: Path) -> Experiment:
    """Read an experiment, in today's words.

    Args:
        file: what `Experiment.write` wrote, with this version or an older one.

    Returns:
        The experiment.
    """
    found = read_experiment(file)
    if found.name not in ABOUT:
        return found
    as_now: Callable[[Experiment], Experiment] = getattr(get(found.name), "as_now", _as_it_is)
    return as_now(found)


def _as_it_is(found: Experiment) -> Experiment:
    return found


def run(name: str, source: Path, on_progress: Report) -> Experiment:
    """Run an experiment.

    Args:
        name: one of `names`.
        source: the built folder of one seed; for those in `RECIPE_ONLY` also a recipe's file.
        on_progress: told how far it is.

    Returns:
        What it found.

    Raises:
        BenchError: if there is no such experiment or folder, or the line is not made for it.
    """
    begun, module = time.perf_counter(), get(name)
    found: Experiment
    if source.is_file() and name in RECIPE_ONLY:
        found = module.run(source)
    else:
        found = _on_a_line(module, source, on_progress)
    update = {"outcome": tuple(module.outcome(found)), "seconds": time.perf_counter() - begun}
    return found.model_copy(update=update)


def _on_a_line(module: ModuleType, folder: Path, on_progress: Report) -> Experiment:
    name: str = module.NAME
    line = lines.built(folder)
    built = results.read(results.Build, folder / results.BUILD_NAME)
    _check(name, line, folder)
    found: Experiment
    if name in RECIPE_ONLY:
        found, settings = module.run(line.task_vectors(folder)), {}
    else:
        extra = [line.trainer(folder)] if name == "overtraining" else []  # type: ignore[attr-defined]
        found = module.run(line, folder, *extra, on_progress=on_progress)
        settings = _questions(built.settings, len(line.columns))
    update = {
        "line": built.line,
        "preset": built.preset,
        "seeds": (built.seed,),
        "settings": {**found.settings, **settings},
    }
    return found.model_copy(update=update)


def _check(name: str, line: Line, folder: Path) -> None:
    """Refuse a line that an experiment is not made for."""
    if _able(name, line, folder):
        return
    others = [other for other in lines.names() if _able(name, lines.get(other), folder)]
    raise BenchError(
        f"{name} is not made for line {line.name}, only for {', '.join(others)}; "
        f"all lines have {' and '.join(RECIPE_ONLY)}"
    )


def _able(name: str, line: Line, folder: Path) -> bool:
    """Those that score merges need a line whose merges are of task vectors, nothing composed."""
    plain = line.recipe(folder, "task_arithmetic", {}) == line.task_vectors(folder)
    trains = name != "overtraining" or hasattr(line, "trainer")
    return name in RECIPE_ONLY or (plain and trains)


def _questions(settings: dict[str, object], columns: int) -> dict[str, int]:
    """How many questions a test asks, where the preset tells how many each task has."""
    asked = settings.get("questions")
    count = asked.get("test") if isinstance(asked, dict) else None
    return {QUESTIONS: count * columns} if isinstance(count, int) else {}
