"""Train the three miniatures, from a seed, on generated scenes.

The language model learns the shared kinds of question in words. Each multimodal model then learns
to see in front of the frozen language model (stage 1), and last the language model itself learns
more kinds of question, other ones in each (stage 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from omnimerge.bench import miniatures
from omnimerge.bench.lessons import Lessons
from omnimerge.bench.processes import trainers
from omnimerge.bench.stages import LEARN, READ, REVISE, SEE, Stage
from omnimerge.errors import CheckpointError


class Examples(Protocol):
    """What `train` draws batches from."""

    name: str

    def batch(self, rng: np.random.Generator, stage: Stage) -> dict[str, torch.Tensor]:
        """Draw one batch: the model's inputs, with labels."""


def train(
    model: Any,
    lessons: Examples,
    stage: Stage,
    *,
    seed: int,
    on_progress: Callable[[str], None] | None = None,
    learns: Callable[[str], bool] | None = None,
) -> float:
    """Run one stage of training, in place.

    Args:
        model: The model.
        lessons: Its examples.
        stage: What to learn.
        seed: Same seed, same order of examples.
        on_progress: Told the loss now and then.
        learns: Tells by its name whether a parameter changes; default: as the stage says of the
            tower and the language model.

    Returns:
        The mean loss of the last fifty steps.
    """
    for key, weight in model.named_parameters():
        chosen = learns(key) if learns else stage.llm if is_llm(key) else stage.tower
        weight.requires_grad_(chosen)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(
        learning, lr=stage.rate, betas=(0.9, 0.98), weight_decay=stage.decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _warmth(step, stage.steps))
    rng = np.random.default_rng([seed, *stage.name.encode(), *lessons.name.encode()])
    scaled = [weight for key, weight in model.named_parameters() if stage.llm and is_llm(key)]
    start = [weight.detach().clone() for weight in scaled]
    model.train()
    losses: list[float] = []
    for step in range(stage.steps):
        whole = _weaken(scaled, start, stage, rng)
        loss = model(**lessons.batch(rng, stage), use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        _restore(scaled, whole)
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if on_progress is not None and (step + 1) % 250 == 0:
            recent = sum(losses[-50:]) / 50
            on_progress(f"{lessons.name} {stage.name} {step + 1}/{stage.steps} loss {recent:.4f}")
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def _weaken(
    weights: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    stage: Stage,
    rng: np.random.Generator,
) -> list[torch.Tensor]:
    """Put weights part of the way back to where they started; return them as they were."""
    if stage.weakest >= 1:
        return []
    whole = [weight.detach().clone() for weight in weights]
    share = float(rng.uniform(stage.weakest, 1.0))
    for weight, first in zip(weights, start, strict=True):
        weight.data.lerp_(first, 1.0 - share)
    return whole


def _restore(weights: Sequence[torch.Tensor], whole: Sequence[torch.Tensor]) -> None:
    """Undo `_weaken`; the gradient stays, which Adam does not mind being scaled."""
    for weight, value in zip(weights, whole, strict=False):
        weight.data.copy_(value)


def is_llm(key: str) -> bool:
    """Tell whether a parameter, named as in memory, belongs to the language model.

    Args:
        key: The parameter's name.

    Returns:
        False for the vision tower, the projector and the line break of LLaVA-OneVision.
    """
    return not key.startswith(
        ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.", "model.image_newl")
    )


def _warmth(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: 5 % warm-up, then a cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def build(
    folder: Path, *, seed: int = 0, on_progress: Callable[[str], None] | None = None
) -> list[Path]:
    """Train and save the three miniatures, the two multimodal ones at the same time.

    Each stage runs in its own process with one thread, so that the sums are always in one order.

    Args:
        folder: Where the checkpoints go, one folder each.
        seed: Same seed, same weights, on the same machine with the same versions.
        on_progress: Told when a stage begins and ends.

    Returns:
        The folders written.
    """
    report = on_progress or (lambda _: None)
    with trainers() as pool:
        report(f"{miniatures.LLM}: learns to read")
        report(pool.submit(build_llm, folder / miniatures.LLM, seed=seed).result())
        report(f"{miniatures.TARGET}, {miniatures.DONOR}: learn to see")
        jobs = [
            pool.submit(build_mllm, name, folder / name, llm=folder / miniatures.LLM, seed=seed)
            for name in (miniatures.TARGET, miniatures.DONOR)
        ]
        for job in jobs:
            report(job.result())
    return [folder / name for name in miniatures.NAMES]


def build_llm(folder: Path, *, seed: int) -> str:
    """Train and save the language model.

    Args:
        folder: The checkpoint to write.
        seed: Of weights and lessons.

    Returns:
        A line about the last loss.
    """
    model = miniatures.model(miniatures.LLM, seed=seed)
    lessons = Lessons(miniatures.LLM, seed=seed)
    for stage in (READ, REVISE):
        loss = train(model, lessons, stage, seed=seed)
        miniatures.save(miniatures.LLM, model, folder)
        model = miniatures.load(miniatures.LLM, folder)
    return f"{miniatures.LLM}: loss {loss:.4f}"


def build_mllm(name: str, folder: Path, *, llm: Path, seed: int) -> str:
    """Train and save a multimodal model over the language model.

    Args:
        name: `miniatures.TARGET` or `miniatures.DONOR`.
        folder: The checkpoint to write.
        llm: The language model's checkpoint.
        seed: Of weights and lessons.

    Returns:
        A line about the last losses.
    """
    model = miniatures.model(name, seed=seed)
    put_llm(model, miniatures.load(miniatures.LLM, llm))
    lessons = Lessons(name, seed=seed)
    saw = train(model, lessons, SEE, seed=seed)
    learned = train(model, lessons, LEARN[name], seed=seed)
    miniatures.save(name, model, folder)
    return f"{name}: loss {saw:.4f} after stage 1, {learned:.4f} after stage 2"


def put_llm(model: Any, llm: Any) -> None:
    """Copy the language model into a multimodal model.

    Args:
        model: The multimodal model, changed in place.
        llm: The language model.
    """
    weights = {
        key.replace("model.", "model.language_model.", 1): value
        for key, value in llm.state_dict().items()
    }
    outcome = model.load_state_dict(weights, strict=False)
    if outcome.unexpected_keys or any(is_llm(key) for key in outcome.missing_keys):
        raise CheckpointError(f"the language model does not fit: {outcome}")
