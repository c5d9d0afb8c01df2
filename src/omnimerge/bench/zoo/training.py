"""Train the three miniatures, from a seed, on generated scenes.

The language model learns the shared kinds of question in words. Each multimodal model then learns
to see in front of the frozen language model (stage 1), and last the language model itself learns
more kinds of question, other ones in each (stage 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnimerge.bench import teaching
from omnimerge.bench.processes import trainers
from omnimerge.bench.teaching import complete_folder
from omnimerge.bench.zoo import miniatures
from omnimerge.bench.zoo.lessons import Lessons
from omnimerge.bench.zoo.stages import LEARN, READ, REVISE, SEE, Stage
from omnimerge.errors import CheckpointError


def train(model: Any, lessons: Lessons, stage: Stage, *, seed: int) -> float:
    """Run one stage of training, in place.

    Args:
        model: The model.
        lessons: Its examples.
        stage: What to learn.
        seed: Same seed, same order of examples.

    Returns:
        The mean loss of the last fifty steps.
    """
    named = dict(model.named_parameters())
    llm = [weight for key, weight in named.items() if is_llm(key)]
    return teaching.train(
        model,
        stage,
        lambda rng: lessons.batch(rng, stage),
        learning=[w for key, w in named.items() if (stage.llm if is_llm(key) else stage.tower)],
        seed=[seed, *stage.name.encode(), *lessons.name.encode()],
        during=_weakened(llm, stage.weakest) if stage.llm and stage.weakest < 1 else None,
    )


def _weakened(
    weights: Sequence[torch.Tensor], weakest: float
) -> Callable[[np.random.Generator], AbstractContextManager[None]]:
    """Return what takes weights part of the way back to where they are now, for one step.

    The gradient stays, which Adam does not mind being scaled.
    """
    start = [weight.detach().clone() for weight in weights]

    @contextmanager
    def weakened(rng: np.random.Generator) -> Iterator[None]:
        whole = [weight.detach().clone() for weight in weights]
        share = float(rng.uniform(weakest, 1.0))
        for weight, first in zip(weights, start, strict=True):
            weight.data.lerp_(first, 1.0 - share)
        yield
        for weight, value in zip(weights, whole, strict=True):
            weight.data.copy_(value)

    return weakened


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
    with complete_folder(folder) as draft:
        for stage in (READ, REVISE):
            loss = train(model, lessons, stage, seed=seed)
            miniatures.save(miniatures.LLM, model, draft)
            model = miniatures.load(miniatures.LLM, draft)
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
    with complete_folder(folder) as draft:
        miniatures.save(name, model, draft)
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
