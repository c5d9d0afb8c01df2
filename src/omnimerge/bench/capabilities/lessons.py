"""Training examples: conversations about scenes that are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from omnimerge.bench.capabilities import models
from omnimerge.bench.capabilities.presets import Stage
from omnimerge.bench.capabilities.tasks import TASKS, Question, draw_scenes
from omnimerge.bench.teaching import padded

_Turns = list[tuple[list[int], list[int]]]


class Lessons:
    """Training examples of one model: scenes encoded once, questions drawn at random.

    Args:
        name: whose processor encodes them.
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
        self._shown, self._pixels = self._show()

    def batch(
        self, rng: np.random.Generator, stage: Stage, kinds: Mapping[str, float]
    ) -> dict[str, torch.Tensor]:
        """Draw one batch.

        Args:
            rng: source of every choice.
            stage: how many questions.
            kinds: ``task.kind`` -> its share of the batch.

        Returns:
            The model's inputs, padded on the right, with labels on the answers alone.
        """
        drawn = [self._conversation(rng, stage.turns, kinds) for _ in range(stage.batch)]
        made = self._pad([turns for _, turns in drawn])
        return made | self._images([scene for scene, _ in drawn])

    def _conversation(
        self, rng: np.random.Generator, count: int, kinds: Mapping[str, float]
    ) -> tuple[int, _Turns]:
        """Draw a scene and turns about it: token ids of each prompt and of its answer."""
        task = _draw(rng, _shares_of_tasks(kinds))
        kinds = {kind: share for kind, share in kinds.items() if kind.startswith(task + ".")}
        turns: _Turns = []
        while not turns:  # a scene may not hold a question of the kinds that are asked
            scene = self._first[task] + int(rng.integers(self._pool))
            asked: set[str] = set()
            for _ in range(count + 2):
                if len(turns) == count:
                    break
                found = self._questions(scene, _draw(rng, kinds))
                question = found[int(rng.integers(len(found)))] if found else None
                if question is None or question.text in asked:
                    continue
                asked.add(question.text)
                turns.append(self._turn(question, first=not turns))
        return scene, turns

    def _questions(self, scene: int, kind: str) -> list[Question]:
        key = (scene, kind)
        if key not in self._asked:
            task, _, name = kind.partition(".")
            self._asked[key] = TASKS[task].questions(self._scenes[scene], name)
        return self._asked[key]

    def _turn(self, question: Question, *, first: bool) -> tuple[list[int], list[int]]:
        answer = self._encode(question.answer + "<|im_end|>")
        ask = f"{question.text}<|im_end|><|assistant|>"
        if first:
            return [*self._shown, *self._encode(ask)], answer
        return self._encode(f"<|user|>{ask}"), answer

    def _encode(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self._tokenizer(text)["input_ids"]
        return self._ids[text]

    def _show(self) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Encode what a conversation about any picture begins with, and the pictures."""
        processor = models.processor(self.name)
        images = [scene.draw() for scene in self._scenes]
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
        text = processor.apply_chat_template(chat, tokenize=False)
        begin = processor(text=[text], images=[images[0]], return_tensors="pt")
        end = self._encode("what<|im_end|>")
        ids = begin["input_ids"][0].tolist()
        found = processor.image_processor(images=images, return_tensors="pt")
        pixels = {key: torch.as_tensor(value) for key, value in found.items() if key in begin}
        if self.name == models.QWEN2VL:  # patches of all pictures in one row: one row each
            patches = pixels["pixel_values"]
            pixels["pixel_values"] = patches.reshape(len(images), -1, patches.shape[-1])
        return ids[: -len(end)], pixels

    def _images(self, scenes: Sequence[int]) -> dict[str, torch.Tensor]:
        chosen = {key: value[torch.tensor(scenes)] for key, value in self._pixels.items()}
        if self.name == models.QWEN2VL:
            chosen["pixel_values"] = chosen["pixel_values"].flatten(0, 1)
        return chosen

    def _pad(self, rows: Sequence[_Turns]) -> dict[str, torch.Tensor]:
        made = padded(rows, self._tokenizer.pad_token_id)
        if self.name == models.QWEN2VL:
            image = models.token_id("<|image_pad|>")
            made["mm_token_type_ids"] = (made["input_ids"] == image).int()
        return made


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
