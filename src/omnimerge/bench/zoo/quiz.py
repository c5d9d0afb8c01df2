"""Ask a miniature questions about scenes, and count the right answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from omnimerge.bench.zoo import miniatures, scenes

MAX_NEW_TOKENS = 4
"""Enough for any answer: two words and the end of the turn."""


def exam(
    *, count: int, seed: int, kinds: Sequence[str] = scenes.KINDS
) -> list[tuple[scenes.Scene, scenes.Question]]:
    """Draw questions of every kind.

    Args:
        count: Questions of each kind.
        seed: Same seed, same exam.
        kinds: Which kinds to ask.

    Returns:
        Scenes with a question each, kind after kind.
    """
    rng = np.random.default_rng(seed)
    return [scenes.sample(rng, kind) for kind in kinds for _ in range(count)]


def answers(
    name: str,
    model: Any,
    sheet: Sequence[tuple[scenes.Scene, scenes.Question]],
    *,
    batch: int = 64,
) -> list[str]:
    """Let a miniature answer, greedily.

    Args:
        name: One of `miniatures.NAMES`; the language model is told the scene, the others see it.
        model: The model.
        sheet: Scenes with a question each.
        batch: Questions answered at once.

    Returns:
        One answer per question, without special tokens.
    """
    reader = miniatures.tokenizer(name) if name == miniatures.LLM else miniatures.processor(name)
    given: list[str] = []
    for start in range(0, len(sheet), batch):
        inputs = _encode(name, reader, sheet[start : start + batch])
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        new = written[:, inputs["input_ids"].shape[1] :]
        given.extend(text.strip() for text in reader.batch_decode(new, skip_special_tokens=True))
    return given


def _encode(
    name: str, reader: Any, sheet: Sequence[tuple[scenes.Scene, scenes.Question]]
) -> Mapping[str, torch.Tensor]:
    """Encode questions as one batch, padded on the left."""
    if name == miniatures.LLM:
        chats = [_chat(f"{scenes.tell(scene)} {question.text}") for scene, question in sheet]
        pictures = {}
    else:
        chats = [
            _chat([{"type": "image"}, {"type": "text", "text": question.text}])
            for _, question in sheet
        ]
        pictures = {"images": [scenes.draw(scene) for scene, _ in sheet]}
    texts = [
        reader.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in chats
    ]
    encoded: Mapping[str, torch.Tensor] = reader(
        text=texts, padding=True, return_tensors="pt", **pictures
    )
    return encoded


def _chat(content: str | list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def accuracy(
    sheet: Sequence[tuple[scenes.Scene, scenes.Question]], given: Sequence[str]
) -> dict[str, float]:
    """Score answers by exact match.

    Args:
        sheet: Scenes with a question each.
        given: The answers.

    Returns:
        Kind of question to the share of right answers.
    """
    right: dict[str, list[bool]] = {}
    for (_, question), answer in zip(sheet, given, strict=True):
        right.setdefault(question.kind, []).append(answer == question.answer)
    return {kind: sum(marks) / len(marks) for kind, marks in right.items()}
