"""Merges by loops that no registered method has, scored as the benchmark scores methods.

A merged task vector is written as a checkpoint of its own, base plus τ; task arithmetic with one
expert then is base + λ τ for any λ, so that a line's subject takes it like every other merge.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from omnimerge.bench.analysis import plan_of, task_vectors_of
from omnimerge.bench.experiments.descent import Loop
from omnimerge.bench.experiments.result import Entry
from omnimerge.bench.grid import SCALES
from omnimerge.bench.line import Report, Subject
from omnimerge.checkpoint import CheckpointWriter
from omnimerge.checkpoint.dtypes import torch_dtype
from omnimerge.engine import MergePlan, TensorJob
from omnimerge.methods import LowRank


def write_variant(recipe: Mapping[str, Any], loop: Loop, out: Path) -> None:
    """Merge by a loop and write base plus τ, with λ = 1.

    Args:
        recipe: what names base and experts.
        loop: how to merge matrices; what is no matrix is averaged.
        out: the checkpoint folder to create.
    """
    plan = plan_of(recipe)
    with CheckpointWriter(out, plan.shards) as writer:
        for job in plan.jobs:
            values = _merged(plan, job, loop) if job.merged else plan.target.read(job.output.name)
            data = values.to(torch_dtype(job.output.dtype)).contiguous().view(-1)
            writer.write(job.output.name, data.view(torch.uint8).numpy().data)
        for file in plan.target.other_files():
            (writer.folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plan.target.folder / file, writer.folder / file)


def recipe_of(recipe: Mapping[str, Any], variant: Path, scale: float) -> dict[str, Any]:
    """Return the recipe that takes a written variant with a scale.

    Args:
        recipe: the line's, for its base.
        variant: what `write_variant` wrote.
        scale: λ.

    Returns:
        A recipe of one expert.
    """
    return {
        "method": "task_arithmetic",
        "base": str(recipe["base"]),
        "target": str(recipe.get("target") or recipe["base"]),
        "models": [str(variant)],
        "parameters": {"scale": scale},
        "select": "linear",
    }


def score_variants(
    subject: Subject,
    recipe: Mapping[str, Any],
    loops: Mapping[str, Loop],
    folder: Path,
    *,
    scales: Sequence[float] = SCALES,
    on_progress: Report,
) -> list[Entry]:
    """Merge by each loop, choose λ on the validation split, score on the test split.

    Args:
        subject: the line's model.
        recipe: the line's recipe, which names base and experts.
        loops: by row.
        folder: an empty folder, for checkpoints that are removed again.
        scales: to choose from; the first of the best is chosen.
        on_progress: told about each row.

    Returns:
        One row per loop, in percent: the columns, their average, and the chosen λ.
    """
    rows = []
    for number, (name, loop) in enumerate(loops.items()):
        out = folder / f"variant-{number}"
        write_variant(recipe, loop, out)
        rows.append(score_variant(subject, recipe, out, name, scales=scales))
        on_progress(f"{name}: {rows[-1].values[-2]:.1f} % with λ = {rows[-1].values[-1]:g}")
        shutil.rmtree(out)
    return rows


def score_variant(
    subject: Subject,
    recipe: Mapping[str, Any],
    variant: Path,
    name: str,
    *,
    scales: Sequence[float] = SCALES,
) -> Entry:
    """Choose λ of a written task vector on the validation split, and score it on the test split.

    Args:
        subject: the line's model.
        recipe: the line's recipe.
        variant: what `write_variant` wrote.
        name: of the row.
        scales: to choose from; the first of the best is chosen.

    Returns:
        The row, in percent: the columns, their average, and the chosen λ.
    """
    averages = []
    for scale in scales:
        subject.put(recipe_of(recipe, variant, scale))
        averages.append(statistics.fmean(subject.score("val").values()))
    chosen = scales[averages.index(max(averages))]
    subject.put(recipe_of(recipe, variant, chosen))
    scores = [100 * value for value in subject.score("test").values()]
    return Entry(name=name, values=(*scores, statistics.fmean(scores), chosen))


def _merged(plan: MergePlan, job: TensorJob, loop: Loop) -> torch.Tensor:
    base, found = task_vectors_of(plan, job)
    deltas = [
        (each.dense() if isinstance(each, LowRank) else each).reshape(base.shape) for each in found
    ]
    if base.dim() < 2 or not any(each.any() for each in deltas):
        return base + sum(deltas[1:], start=deltas[0]) / len(deltas)
    return base + loop.run(deltas)[0]
