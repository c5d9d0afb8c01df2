"""Does training the experts for longer make them merge worse? Figures 5 and 6 of the paper.

Its Theorem 3.1 bounds what a merge loses by terms that grow with learning rate times steps: experts
get better at their own task, while the best merge of them gets better at first, and then worse.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnimerge.bench.experiments.noise import margin, noise
from omnimerge.bench.experiments.result import Curve, Entry, Experiment
from omnimerge.bench.grid import SCALES
from omnimerge.bench.line import BASE, Line, Report, Subject

NAME = "overtraining"
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
METHODS = ("task_arithmetic", "optmerge")

Train = Callable[[Path, float], None]
"""(folder, factor): train every expert with that many times its usual steps, a subfolder each."""


@dataclass(frozen=True)
class Setting:
    """What is trained, merged and scored.

    Attributes:
        factors: times the usual steps, increasing.
        methods: how the experts are merged.
        scales: that λ is chosen from on the validation split.
    """

    factors: Sequence[float] = FACTORS
    methods: Sequence[str] = METHODS
    scales: Sequence[float] = SCALES


def run(
    line: Line,
    folder: Path,
    train: Train,
    *,
    setting: Setting | None = None,
    on_progress: Report,
) -> Experiment:
    """Train experts for shorter and longer, merge them, score experts and merges.

    Args:
        line: the line.
        folder: a built folder of it; its base is where the experts start.
        train: trains the experts.
        setting: what is trained, merged and scored.
        on_progress: told about each factor.

    Returns:
        Averages of experts and merges over the factors.
    """
    setting = setting or Setting()
    subject = line.subject(folder)
    base = 100 * statistics.fmean(line.alone(folder, BASE, "test").values())
    rows = []
    for factor in setting.factors:
        with tempfile.TemporaryDirectory() as scratch:
            train(Path(scratch), factor)
            folders = [Path(scratch) / name for name in line.experts]
            values = _scored(line, folder, subject, folders, setting)
        rows.append(Entry(name=f"{factor:g} x", values=values))
        on_progress(f"{factor:g} x: experts {values[0]:.1f} %, merged {max(values[2:]):.1f} %")
    columns = ("own task", "experts' average", *setting.methods)
    return Experiment(
        name=NAME,
        title="Over-training",
        paper="Figures 5 and 6",
        question="Experts trained with a multiple of their usual steps, and merges of them with λ "
        "chosen on the validation split. Own task: mean over the experts, each on the task that "
        "it was trained for; the others are averages over all tasks.",
        settings={"experts": len(line.experts)},
        x="times the usual number of steps",
        y="right answers, %",
        log_x=True,
        curves=tuple(
            Curve(name=name, x=tuple(setting.factors), y=tuple(r.values[i] or 0.0 for r in rows))
            for i, name in enumerate(columns)
        ),
        levels={"base": base},
        head="steps",
        columns=columns,
        rows=tuple(rows),
    )


def _scored(
    line: Line, folder: Path, subject: Subject, experts: Sequence[Path], setting: Setting
) -> tuple[float, ...]:
    """Own task, experts' average, and the average of each method's merge, in percent."""
    own, averages = [], []
    for name, expert in zip(line.experts, experts, strict=True):
        subject.put(_recipe(line, folder, "task_arithmetic", 1.0, [expert]))
        scores = subject.score("test")
        averages.append(statistics.fmean(scores.values()))
        own.append(next((v for c, v in scores.items() if c.lower() == name.lower()), averages[-1]))
    merged = []
    for method in setting.methods:
        recipes = [_recipe(line, folder, method, scale, experts) for scale in setting.scales]
        found = []
        for recipe in recipes:
            subject.put(recipe)
            found.append(statistics.fmean(subject.score("val").values()))
        subject.put(recipes[found.index(max(found))])
        merged.append(statistics.fmean(subject.score("test").values()))
    every = (statistics.fmean(own), statistics.fmean(averages), *merged)
    return tuple(100 * value for value in every)


def _recipe(
    line: Line, folder: Path, method: str, scale: float, experts: Sequence[Path]
) -> dict[str, Any]:
    """The line's recipe with other experts, full checkpoints or adapters as it has them."""
    recipe = line.recipe(folder, method, {"scale": scale})
    first = recipe["models"][0]
    kind = "adapter" if isinstance(first, Mapping) and "adapter" in first else "model"
    return {**recipe, "models": [{kind: str(expert)} for expert in experts]}


def outcome(result: Experiment) -> list[str]:
    """Say what came out.

    Args:
        result: the numbers.

    Returns:
        Sentences.
    """
    own = result.curve(result.columns[0])
    said = [f"Own task: {own.y[0]:.1f} % with the fewest steps, {own.y[-1]:.1f} % with the most."]
    curves = [result.curve(name) for name in result.columns[2:]]
    points = margin(
        result,
        [v for each in curves for v in each.y],
        [v for each in curves for v in each.deviation],
    )
    bent = 0
    for curve in curves:
        first, top, last = curve.y[0], max(curve.y), curve.y[-1]
        rises, falls = top - first > points, top - last > points
        bent += rises and falls
        said.append(
            f"{curve.name}: {first:.1f} % with the shortest trained experts, at best {top:.1f} % "
            f"({curve.x[curve.y.index(top)]:g} times the usual steps), {last:.1f} % with the "
            f"longest trained: {_SHAPES[rises, falls]}."
        )
    if bent == len(curves):
        said.append("As in the paper, the merge gets better at first, and worse in the end.")
    else:
        said.append(
            "In the paper merges get better at first, and worse in the end; here "
            f"{bent} of {len(curves)} do."
        )
    return [*said, noise(points)]


_SHAPES = {
    (True, True): "better at first, and worse in the end",
    (True, False): "better, and not worse in the end",
    (False, True): "not better at first, and worse in the end",
    (False, False): "within the noise",
}
"""(rises, falls), both by more than the noise."""
