"""Train one seed of a line: the base, then experts and mixture over its frozen vision side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from omnimerge.bench.adapters import check_peft, with_adapter
from omnimerge.bench.capabilities import models
from omnimerge.bench.capabilities.lessons import Lessons
from omnimerge.bench.capabilities.presets import MIXTURE, Preset, Stage
from omnimerge.bench.capabilities.tasks import TASKS
from omnimerge.bench.capabilities.tasks.task import DESCRIBE
from omnimerge.bench.line import BASE, Report
from omnimerge.bench.processes import trainers
from omnimerge.bench.teaching import complete_folder, train

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
    look = _teach(model, lessons, "look", described, preset.look, seed)
    answer = _teach(model, lessons, "answer", asked, preset.answer, seed)
    with complete_folder(folder / BASE) as draft:
        models.save(name, model, draft)
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
    model = models.load(folder / BASE)
    loss = _specialise(model, name, preset, expert, seed, "language_model.layers.")
    with complete_folder((out or folder) / expert) as draft:
        models.save(name, model, draft)
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
        models.load(folder / BASE),
        rank=preset.rank,
        matrices=rf".*language_model\.layers\..*\.({'|'.join(_ADAPTED)})",
        draw=lambda key: _generator(f"{seed} {expert} {key}"),
    )
    loss = _specialise(model, name, preset, expert, seed, "lora_")
    with complete_folder((out or folder) / expert) as draft:
        model.save_pretrained(str(draft))
    return f"{expert}: loss {loss:.3f}"


def _specialise(
    model: Any, name: str, preset: Preset, expert: str, seed: int, learning: str
) -> float:
    """Train the parameters whose names hold `learning`, on one task or on all."""
    mixed = expert == MIXTURE
    kinds: dict[str, float] = {}
    for task in TASKS if mixed else [expert]:
        asked = preset.kinds_of(task)
        kinds |= dict.fromkeys(asked, 1 / len(asked))
    lessons = Lessons(name, list(kinds), seed=seed, pool=preset.pool)
    stage = preset.mixture if mixed else preset.expert
    return _teach(model, lessons, expert, kinds, stage, seed, learning)


def _teach(
    model: Any,
    lessons: Lessons,
    name: str,
    kinds: Mapping[str, float],
    stage: Stage,
    seed: int,
    learning: str = "",
) -> float:
    """Run a stage, whose name and the lessons' give it its own random numbers."""
    return train(
        model,
        stage,
        lambda rng: lessons.batch(rng, stage, kinds),
        learning=[weight for key, weight in model.named_parameters() if learning in key],
        seed=[seed, *name.encode(), *lessons.name.encode()],
    )


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
