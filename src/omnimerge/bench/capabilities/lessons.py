"""Training examples: conversations about scenes that are told or shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from omnimerge.bench.capabilities import models
from omnimerge.bench.capabilities.tasks import TASKS, Question, draw_scenes
from omnimerge.bench.stages import Stage

IGNORED = -100  # what transformers' loss leaves out

_Turns = list[tuple[list[int], list[int]]]


class Lessons:
    """Training examples of one model: scenes encoded once, questions drawn at random.

    Args:
        name: whose processor, or tokenizer, encodes them.
        kinds: the kinds of question, ``task.kind`` each; scenes of their tasks are drawn.
        seed: same seed, same scenes.
        pool: number of scenes of each task.
    """

    def __init__(self, name: str, kinds: Sequence[str], *, seed: int, pool: int) -> None:
        self.name = name
        tasks = dict.fromkeys(kind.partition(".")[0] for kind in kinds)
        self._first = {task: number * pool for number, task in enumerate(tasks)}
        self._pool = pool
        self._scenes = [
            scene for task in tasks for scene in draw_scenes(TASKS[task], "train", pool, seed=seed)
        ]
        self._asked: dict[tuple[int, str], list[Question]] = {}
        self._ids: dict[str, list[int]] = {}
        self._tokenizer = models.tokenizer(name)
        self._pixels: dict[str, torch.Tensor] = {}
        self._shown: list[int] = []
        if name != models.LLM:
            self._show()

    def batch(self, rng: np.random.Generator, stage: Stage) -> dict[str, torch.Tensor]:
        """Draw one batch.

        Args:
            rng: source of every choice.
            stage: how many questions, of which kinds.

        Returns:
            The model's inputs, padded on the right, with labels on the answers alone.
        """
        drawn = [self._conversation(rng, stage) for _ in range(stage.batch)]
        padded = self._pad([turns for _, turns in drawn])
        return padded | self._images([scene for scene, _ in drawn])

    def _conversation(self, rng: np.random.Generator, stage: Stage) -> tuple[int, _Turns]:
        """Draw a scene and turns about it: token ids of each prompt and of its answer."""
        task = _draw(rng, _shares_of_tasks(stage.kinds))
        kinds = {kind: share for kind, share in stage.kinds.items() if kind.startswith(task + ".")}
        turns: _Turns = []
        while not turns:  # a scene may not hold a question of the kinds that are asked
            scene = self._first[task] + int(rng.integers(self._pool))
            asked: set[str] = set()
            for _ in range(stage.turns + 2):
                if len(turns) == stage.turns:
                    break
                found = self._questions(scene, _draw(rng, kinds))
                question = found[int(rng.integers(len(found)))] if found else None
                if question is None or question.text in asked:
                    continue
                asked.add(question.text)
                turns.append(self._turn(scene, question, first=not turns))
        return scene, turns

    def _questions(self, scene: int, kind: str) -> list[Question]:
        key = (scene, kind)
        if key not in self._asked:
            task, _, name = kind.partition(".")
            self._asked[key] = TASKS[task].questions(self._scenes[scene], name)
        return self._asked[key]

    def _turn(self, scene: int, question: Question, *, first: bool) -> tuple[list[int], list[int]]:
        answer = self._encode(question.answer + "<|im_end|>")
        if not first:
            ask = f"<|user|>{question.text}<|im_end|><|assistant|>"
            return self._encode(ask), answer
        ask = f"{question.text}<|im_end|><|assistant|>"
        if self._shown:
            return [*self._shown, *self._encode(ask)], answer
        told = self._scenes[scene].tell()
        return self._encode(f"<|user|>{told} {ask}"), answer

    def _encode(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self._tokenizer(text)["input_ids"]
        return self._ids[text]

    def _show(self) -> None:
        """Encode the pictures, and what a conversation about any of them begins with."""
        processor = models.processor(self.name)
        images = [scene.draw() for scene in self._scenes]
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
        text = processor.apply_chat_template(chat, tokenize=False)
        begin = processor(text=[text], images=[images[0]], return_tensors="pt")
        end = self._encode("what<|im_end|>")
        ids = begin["input_ids"][0].tolist()
        self._shown = ids[: -len(end)]
        found = processor.image_processor(images=images, return_tensors="pt")
        self._pixels = {key: torch.as_tensor(value) for key, value in found.items() if key in begin}
        if self.name == models.QWEN2VL:  # patches of all pictures in one row: one row each
            pixels = self._pixels["pixel_values"]
            self._pixels["pixel_values"] = pixels.reshape(len(images), -1, pixels.shape[-1])

    def _images(self, scenes: Sequence[int]) -> dict[str, torch.Tensor]:
        chosen = {key: value[torch.tensor(scenes)] for key, value in self._pixels.items()}
        if self.name == models.QWEN2VL:
            chosen["pixel_values"] = chosen["pixel_values"].flatten(0, 1)
        return chosen

    def _pad(self, rows: Sequence[_Turns]) -> dict[str, torch.Tensor]:
        width = max(sum(len(ids) for turn in row for ids in turn) for row in rows)
        ids = torch.full((len(rows), width), self._tokenizer.pad_token_id)
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
        padded: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.name == models.QWEN2VL:
            image = models.token_id("<|image_pad|>")
            padded["mm_token_type_ids"] = (ids == image).int()
        return padded


def _shares_of_tasks(kinds: Mapping[str, float]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for kind, share in kinds.items():
        task = kind.partition(".")[0]
        shares[task] = shares.get(task, 0.0) + share
    return shares


def _draw(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    names = list(shares)
    odds = np.cumsum([shares[name] for name in names])
    return names[int(np.searchsorted(odds, rng.random() * odds[-1]))]
