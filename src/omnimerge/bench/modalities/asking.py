"""Questions with their media as batches, and the share of them that a model answers right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omnimerge.bench.modalities import media
from omnimerge.bench.modalities.world import COLUMNS, Modality, Question, questions

_KEYWORDS = {"image": "images", "audio": "audio", "video": "videos"}
_BATCH = 64


@dataclass(frozen=True)
class Asked:
    """A batch of questions.

    Attributes:
        column: of the table.
        inputs: of the model, padded on the left.
        answers: the right words.
    """

    column: str
    inputs: dict[str, Any]
    answers: tuple[str, ...]


def ask(
    processor: Any, shown: Sequence[Modality], *, seed: int, split: str, count: int
) -> list[Asked]:
    """Make the batches of a split.

    Args:
        processor: an `OmniProcessor`.
        shown: the modalities that the model takes; of these, a question's media are shown that it
            needs.
        seed: of the line.
        split: `val` or `test`.
        count: questions per column.

    Returns:
        The batches; in each, all questions have media of the same modalities.
    """
    found = []
    drawn = questions(seed, split, count)  # type: ignore[arg-type]
    for column in COLUMNS:
        rng = np.random.default_rng([seed, *split.encode(), *column.encode()])
        groups: dict[tuple[Modality, ...], list[tuple[Question, dict[str, Any]]]] = {}
        for question in drawn[column]:
            made: dict[str, Any] = {
                kind: media.make(question.world, kind, rng) for kind in question.kind.needs
            }
            given = tuple(kind for kind in question.kind.needs if kind in shown)
            groups.setdefault(given, []).append((question, made))
        for given, members in groups.items():
            for start in range(0, len(members), _BATCH):
                found.append(_batch(processor, column, given, members[start : start + _BATCH]))
    return found


def _batch(
    processor: Any,
    column: str,
    given: Sequence[Modality],
    members: Sequence[tuple[Question, dict[str, Any]]],
) -> Asked:
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [
                *({"type": kind} for kind in given),
                {"type": "text", "text": f"question : {question.kind.words}"},
            ]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question, _ in members
    ]  # fmt: skip
    shown = {_KEYWORDS[kind]: [made[kind] for _, made in members] for kind in given}
    inputs = processor(text=texts, padding=True, return_tensors="pt", **shown)
    return Asked(column, dict(inputs), tuple(question.answer for question, _ in members))


def answer(
    model: Callable[..., Any],
    tokenizer: Any,
    batches: Sequence[Asked],
    within: Callable[[Tensor], AbstractContextManager[None]] | None = None,
) -> list[str]:
    """Answer questions by the most probable word, which is what greedy decoding gives.

    Args:
        model: takes the inputs, returns logits.
        tokenizer: its tokenizer.
        batches: the questions.
        within: opens a block around each batch, given its token ids.

    Returns:
        One word per question, in order.
    """
    found: list[str] = []
    for batch in batches:
        block = within(batch.inputs["input_ids"]) if within else nullcontext()
        with torch.inference_mode(), block:
            logits = model(**batch.inputs, use_cache=False).logits[:, -1]
        found += [tokenizer.decode([token]).strip() for token in logits.argmax(dim=-1).tolist()]
    return found


def scores(batches: Sequence[Asked], answers: Sequence[str]) -> dict[str, float]:
    """Return the share of right answers.

    Args:
        batches: the questions.
        answers: one word per question, in order.

    Returns:
        Column -> share in [0, 1].
    """
    given = iter(answers)
    right: dict[str, list[bool]] = {name: [] for name in COLUMNS}
    for batch in batches:
        right[batch.column] += [wanted == next(given) for wanted in batch.answers]
    return {name: sum(each) / max(1, len(each)) for name, each in right.items()}
