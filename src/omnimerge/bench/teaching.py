"""What all trainings of this room have in common: the optimiser, its schedule, complete folders.

This file imports neither torch nor numpy until something is trained.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

Batch = dict[str, Any]
"""A model's inputs, with labels."""

Turns = Sequence[tuple[list[int], list[int]]]
"""A conversation: token ids of each prompt and of its answer."""

IGNORED = -100
"""The label that transformers' loss leaves out."""

_BETAS = (0.9, 0.98)
_DECAY = 0.01
_LONGEST = 1.0  # of the gradient
_WARM_UP = 20  # one step in so many
_RECENT = 50  # steps whose losses are averaged


@dataclass(frozen=True)
class Stage:
    """One stage of training; each line adds its own defaults, and what else differs.

    Attributes:
        steps: optimiser steps.
        rate: peak learning rate, after a warm-up and before a cosine decay.
        batch: conversations in a step.
        turns: questions in a conversation.
    """

    steps: int
    rate: float
    batch: int
    turns: int


def train(
    model: Any,
    stage: Stage,
    draw: Callable[[np.random.Generator], Batch],
    *,
    learning: Sequence[torch.nn.Parameter],
    seed: Sequence[int],
    loss: Callable[[Batch, np.random.Generator], torch.Tensor] | None = None,
    during: Callable[[np.random.Generator], AbstractContextManager[None]] | None = None,
) -> float:
    """Run one stage of training, in place.

    Args:
        model: the model.
        stage: how long.
        draw: draws a batch.
        learning: the parameters that change.
        seed: same seed, same order of examples.
        loss: works out the loss of a batch; default: the model's own.
        during: held around each step's batch, loss and gradient, before the optimiser's step;
            default: nothing.

    Returns:
        The mean loss of the last fifty steps.
    """
    import numpy as np
    import torch

    model.requires_grad_(False)
    for weight in learning:
        weight.requires_grad_(True)
    optimiser = torch.optim.AdamW(
        learning, lr=stage.rate, betas=_BETAS, weight_decay=_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warmth(step, stage.steps))
    rng = np.random.default_rng(list(seed))
    model.train()
    losses: list[float] = []
    for _ in range(stage.steps):
        with during(rng) if during else nullcontext():
            batch = draw(rng)
            found = loss(batch, rng) if loss else model(**batch, use_cache=False).loss
            optimiser.zero_grad()
            found.backward()
        torch.nn.utils.clip_grad_norm_(learning, _LONGEST)
        optimiser.step()
        schedule.step()
        losses.append(found.item())
    model.eval()
    return sum(losses[-_RECENT:]) / len(losses[-_RECENT:])


def warmth(step: int, steps: int) -> float:
    """Return the share of the peak learning rate: 5 % warm-up, then a cosine to zero.

    Args:
        step: which, from 0.
        steps: how many there are.

    Returns:
        A share in (0, 1], and 0 when all steps are done.
    """
    warm = max(1, steps // _WARM_UP)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Write a folder that appears under its name only when the block ends well.

    Args:
        folder: its name. Where it is there already, it gets the new files at the end.

    Yields:
        The empty folder to write into.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if folder.is_dir():
            shutil.copytree(draft, folder, dirs_exist_ok=True)
        else:
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def padded(rows: Sequence[Turns], pad: int) -> Batch:
    """Put conversations below each other, padded on the right, with labels on the answers alone.

    Args:
        rows: of each conversation the token ids of every prompt and of its answer.
        pad: the token that fills up.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each (conversations, longest).
    """
    import torch

    width = max(sum(len(ids) for turn in row for ids in turn) for row in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        start = 0
        for prompt, answer in row:
            middle = start + len(prompt)
            end = middle + len(answer)
            ids[number, start:end] = torch.tensor(prompt + answer)
            labels[number, middle:end] = torch.tensor(answer)
            start = end
        mask[number, :start] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
