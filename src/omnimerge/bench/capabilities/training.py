"""Train one seed of a line: the base, then experts and mixture over its frozen vision side."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from omnimerge.bench.adapters import check_peft, with_adapter
from omnimerge.bench.capabilities import models
from omnimerge.bench.capabilities.lessons import Lessons
from omnimerge.bench.capabilities.presets import Preset, Schooling
from omnimerge.bench.capabilities.tasks import TASKS
from omnimerge.bench.capabilities.tasks.task import DESCRIBE
from omnimerge.bench.line import BASE, Report
from omnimerge.bench.processes import trainers
from omnimerge.bench.stages import Stage
from omnimerge.bench.training import train

MIXTURE = "mixture"

_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build(
    name: str, folder: Path, preset: Preset, *, lora: bool, seed: int, on_progress: Report
) -> None:
    """Train what is not there yet.

    Each model is trained in a process of its own with one thread, so that sums are always in one
    order, and its folder appears when it is complete.

    Args:
        name: the miniature.
        folder: where to; one subfolder per model.
        preset: how long to train what.
        lora: whether the experts are LoRA adapters.
        seed: same seed, same bytes, on one machine with the same versions.
        on_progress: told when a model is ready.
    """
    if lora:
        check_peft()
    with trainers() as pool:
        if not (folder / BASE).is_dir():
            on_progress(f"{name}: learns to see")
            on_progress(pool.submit(build_base, name, folder, preset, seed).result())
        missing = [each for each in (MIXTURE, *TASKS) if not (folder / each).is_dir()]
        if missing:
            on_progress(f"{name}: learns more: {', '.join(missing)}")
        jobs = [
            pool.submit(_work(each, lora), name, folder, preset, each, seed) for each in missing
        ]
        for job in jobs:
            on_progress(job.result())


def train_experts(
    name: str, folder: Path, preset: Preset, *, lora: bool, seed: int, out: Path
) -> None:
    """Train all experts of a built line again, somewhere else.

    Args:
        name: the miniature.
        folder: where the base is.
        preset: how long.
        lora: whether the experts are LoRA adapters.
        seed: of the lessons; that of the build gives the build's experts.
        out: where to; one subfolder per expert.
    """
    if lora:
        check_peft()
    with trainers() as pool:
        jobs = [
            pool.submit(_work(each, lora), name, folder, preset, each, seed, out) for each in TASKS
        ]
        for job in jobs:
            job.result()


def _work(expert: str, lora: bool) -> Callable[..., str]:
    return build_adapter if lora and expert != MIXTURE else build_expert


def build_base(name: str, folder: Path, preset: Preset, seed: int) -> str:
    """Train the base: first to describe pictures, then to answer questions, some kinds seldom.

    Args:
        name: the miniature.
        folder: where its folder goes.
        preset: how long.
        seed: of weights and lessons.

    Returns:
        A line about the last losses.
    """
    model = models.model(name, seed=seed)
    described = {f"{task}.{DESCRIBE}": 1.0 for task in TASKS}
    asked = {kind: share for task in TASKS for kind, share in preset.kinds_of(task).items()}
    lessons = Lessons(name, list(described), seed=seed, pool=preset.pool)
    look = train(model, lessons, _stage("look", described, preset.look), seed=seed)
    answer = train(model, lessons, _stage("answer", asked, preset.answer), seed=seed)
    _finish(folder / BASE, lambda out: models.save(name, model, out))
    return f"{BASE}: loss {look:.3f} describing, {answer:.3f} answering"


def build_expert(
    name: str, folder: Path, preset: Preset, expert: str, seed: int, out: Path | None = None
) -> str:
    """Fine-tune the language model of the base, all of its layers.

    Args:
        name: the miniature.
        folder: where the base is.
        preset: how long.
        expert: a task, or `MIXTURE` for all of them.
        seed: of the lessons.
        out: where the expert's folder goes; default: beside the base.

    Returns:
        A line about the last loss.
    """
    model = models.load(name, folder / BASE)
    loss = _teach(model, name, preset, expert, seed, "language_model.layers.")
    _finish((out or folder) / expert, lambda place: models.save(name, model, place))
    return f"{expert}: loss {loss:.3f}"


def build_adapter(
    name: str, folder: Path, preset: Preset, expert: str, seed: int, out: Path | None = None
) -> str:
    """Train a LoRA adapter of the base's language model with PEFT.

    Args:
        name: the miniature.
        folder: where the base is.
        preset: how long.
        expert: a task.
        seed: of the lessons and the first weights.
        out: where the adapter's folder goes; default: beside the base.

    Returns:
        A line about the last loss.
    """
    model = with_adapter(
        models.load(name, folder / BASE),
        rank=preset.rank,
        matrices=rf".*language_model\.layers\..*\.({'|'.join(_ADAPTED)})",
        draw=lambda key: _generator(f"{seed} {expert} {key}"),
    )
    loss = _teach(model, name, preset, expert, seed, "lora_")
    _finish((out or folder) / expert, lambda place: model.save_pretrained(str(place)))
    return f"{expert}: loss {loss:.3f}"


def _teach(model: Any, name: str, preset: Preset, expert: str, seed: int, learning: str) -> float:
    """Train the parameters whose names hold `learning`, on one task or on all."""
    mixed = expert == MIXTURE
    tasks: dict[str, float] = {}
    for task in TASKS if mixed else [expert]:
        kinds = preset.kinds_of(task)
        tasks |= dict.fromkeys(kinds, 1 / len(kinds))
    lessons = Lessons(name, list(tasks), seed=seed, pool=preset.pool)
    stage = _stage(expert, tasks, preset.mixture if mixed else preset.expert)
    return train(model, lessons, stage, seed=seed, learns=lambda key: learning in key)


def _stage(name: str, kinds: dict[str, float], how: Schooling) -> Stage:
    return Stage(name, kinds, how.steps, how.rate, batch=how.batch, turns=how.turns)


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _finish(folder: Path, save: Any) -> None:
    """Save into a hidden folder, and give it its name at last."""
    hidden = folder.with_name(f".{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    save(hidden)
    hidden.rename(folder)
