"""Train the line: the language model in words, the towers before it, then an expert of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnimerge.bench.modalities import models
from omnimerge.bench.modalities.lessons import Lessons, Pool
from omnimerge.bench.modalities.world import MODALITIES, Modality

Report = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        steps: optimiser steps.
        rate: peak learning rate, after a warm-up and before a cosine decay.
        batch: conversations in a step.
        turns: questions in a conversation.
    """

    steps: int
    rate: float
    batch: int = 16
    turns: int = 6


@dataclass(frozen=True)
class Preset:
    """How long everything is trained, and how much is asked.

    Attributes:
        read: the language model learns to answer about facts in words.
        see: a tower and its projector learn before the frozen language model.
        learn: the expert's language model learns the questions that are its own.
        pool: media per modality that are trained on.
        val: questions per column for choosing.
        test: questions per column that are reported.
    """

    read: Stage
    see: Stage
    learn: Stage
    pool: int
    val: int
    test: int


PRESETS = {
    "quick": Preset(
        read=Stage(2000, 3e-3),
        see=Stage(400, 3e-3),
        learn=Stage(150, 6e-4),
        pool=600,
        val=60,
        test=120,
    ),
    "full": Preset(
        read=Stage(6000, 3e-3),
        see=Stage(1500, 3e-3),
        learn=Stage(400, 6e-4),
        pool=2500,
        val=120,
        test=300,
    ),
}
"""`full` takes about nine minutes on one core, `quick` about two and a half."""


def build(name: str, folder: Path, llm: Path, preset: Preset, seed: int, report: Report) -> None:
    """Train and save one of the models.

    Args:
        name: `models.LLM`, or a modality.
        folder: the checkpoint to write.
        llm: the language model's checkpoint.
        preset: how long.
        seed: of everything that is drawn.
        report: told the losses.
    """
    if name == models.LLM:
        build_llm(folder, preset, seed=seed, report=report)
    else:
        modality = MODALITIES[MODALITIES.index(name)]
        build_expert(modality, folder, llm, preset, seed=seed, report=report)


def build_llm(folder: Path, preset: Preset, *, seed: int, report: Report) -> None:
    """Train and save the language model.

    Args:
        folder: the checkpoint to write.
        preset: how long.
        seed: of weights and lessons.
        report: told the loss.
    """
    model = models.new(models.LLM, seed=seed)
    lessons = Lessons(None, None, told=0.75, learned=False)
    loss = _train(model, lessons, preset.read, list(model.parameters()), [seed, 1])
    models.save(models.LLM, model, folder)
    report(f"{models.LLM}: loss {loss:.4f}")


def build_expert(
    modality: Modality, folder: Path, llm: Path, preset: Preset, *, seed: int, report: Report
) -> None:
    """Train and save an expert.

    Args:
        modality: what it sees or hears.
        folder: the checkpoint to write.
        llm: the language model's checkpoint.
        preset: how long.
        seed: of weights, media and lessons.
        report: told the losses.
    """
    model = models.new(modality, seed=seed)
    _put_llm(model, llm)
    models.save(modality, model, folder)  # the processor is read from there
    pool = Pool(modality, folder, seed=seed, size=preset.pool)
    inside = {id(weight) for weight in _llm_weights(model)}
    tower = [weight for weight in model.parameters() if id(weight) not in inside]
    number = 2 + MODALITIES.index(modality)
    saw = _train(
        model,
        Lessons(modality, pool, told=0.3, learned=False),
        preset.see,
        tower,
        [seed, number, 1],
    )
    matrices = [w for w in model.get_decoder().layers.parameters() if w.ndim == 2]
    learned = _train(
        model, Lessons(modality, pool, told=0.5, learned=True), preset.learn, matrices,
        [seed, number, 2],
    )  # fmt: skip
    models.save(modality, model, folder)
    report(f"{modality}: loss {saw:.4f} before the frozen LLM, {learned:.4f} with its own")


def _put_llm(model: Any, folder: Path) -> None:
    from transformers import Qwen2ForCausalLM

    llm = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_decoder().load_state_dict(llm.model.state_dict())
    model.get_output_embeddings().load_state_dict(llm.lm_head.state_dict())


def _llm_weights(model: Any) -> list[torch.nn.Parameter]:
    return [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]


def _train(
    model: Any,
    lessons: Lessons,
    stage: Stage,
    learning: Sequence[torch.nn.Parameter],
    seed: Sequence[int],
) -> float:
    """Run a stage in place; return the mean loss of the last fifty steps."""
    for weight in model.parameters():
        weight.requires_grad_(False)
    for weight in learning:
        weight.requires_grad_(True)
    optimiser = torch.optim.AdamW(
        learning, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: _warmth(n, stage.steps))
    rng = np.random.default_rng(list(seed))
    model.train()
    losses: list[float] = []
    for _ in range(stage.steps):
        loss = model(**lessons.batch(rng, stage.batch, stage.turns), use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def _warmth(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: 5 % warm-up, then a cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
