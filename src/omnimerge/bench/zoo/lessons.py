"""Training examples: conversations about scenes, encoded as the processors encode them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from omnimerge.bench.teaching import padded
from omnimerge.bench.zoo import miniatures, scenes
from omnimerge.bench.zoo.stages import Stage

POOL = 8000
"""Number of training scenes."""


class Lessons:
    """Training examples of one model: scenes encoded once, questions drawn at random.

    Args:
        name: Whose processor, or tokenizer, encodes them.
        seed: Same seed, same scenes.
        size: Number of scenes.
    """

    def __init__(self, name: str, *, seed: int, size: int = POOL) -> None:
        rng = np.random.default_rng([seed, 1])
        self.name = name
        self.scenes = [scenes.random_scene(rng, fewest=3) for _ in range(size)]
        self._asked: dict[tuple[int, str], list[scenes.Question]] = {}
        self._answers: dict[str, list[int]] = {}
        self._follow_ups: dict[str, list[int]] = {}
        self._prompts: dict[str, list[int]] = {}
        self._tokenizer = miniatures.tokenizer(name)
        self._processor: Any = None
        self._pixels: dict[str, torch.Tensor] = {}
        if name != miniatures.LLM:
            self._processor = miniatures.processor(name)
            self._pixels = self._encode_images()

    def batch(self, rng: np.random.Generator, stage: Stage) -> dict[str, torch.Tensor]:
        """Draw one batch.

        Args:
            rng: Source of every choice.
            stage: How many questions, of which kinds.

        Returns:
            The model's inputs, padded on the right, with labels on the answers alone.
        """
        indices = rng.integers(len(self.scenes), size=stage.batch).tolist()
        rows = [self._conversation(index, rng, stage) for index in indices]
        return self._pad(rows) | self._images(indices)

    def _conversation(
        self, index: int, rng: np.random.Generator, stage: Stage
    ) -> list[tuple[list[int], list[int]]]:
        """Draw the turns about one scene: token ids of each prompt and of its answer."""
        turns: list[tuple[list[int], list[int]]] = []
        kinds = list(stage.kinds)
        odds = np.cumsum([stage.kinds[kind] for kind in kinds])
        asked: set[str] = set()
        for _ in range(3 * stage.turns):  # small scenes may not hold enough questions
            if len(turns) == stage.turns:
                break
            kind = kinds[int(np.searchsorted(odds, rng.random() * odds[-1]))]
            found = self._questions(index, kind)
            if not found:
                continue
            question = found[int(rng.integers(len(found)))]
            if question.text not in asked:
                asked.add(question.text)
                opening = self._next(question.text) if turns else self._prompt(index, question.text)
                turns.append((opening, self._answer(question.answer)))
        return turns

    def _questions(self, index: int, kind: str) -> list[scenes.Question]:
        key = (index, kind)
        if key not in self._asked:
            self._asked[key] = scenes.questions(self.scenes[index], kind)
        return self._asked[key]

    def _answer(self, text: str) -> list[int]:
        if text not in self._answers:
            self._answers[text] = self._tokenizer(text + "<|im_end|>")["input_ids"]
        return self._answers[text]

    def _next(self, text: str) -> list[int]:
        """Return the token ids between one answer and the next, as the chat template has them."""
        if text not in self._follow_ups:
            turn = f"\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            self._follow_ups[text] = self._tokenizer(turn)["input_ids"]
        return self._follow_ups[text]

    def _prompt(self, index: int, text: str) -> list[int]:
        """Return the token ids of a question; with pictures they are the same for all scenes."""
        if self._processor is None:
            return encode_text(self._tokenizer, scenes.tell(self.scenes[index]), text)
        if text not in self._prompts:
            image = scenes.draw(self.scenes[index])
            encoded = encode_image(self._processor, image, text)
            self._prompts[text] = encoded["input_ids"][0].tolist()
        return self._prompts[text]

    def _encode_images(self) -> dict[str, torch.Tensor]:
        images = [scenes.draw(scene) for scene in self.scenes]
        encoded = self._processor.image_processor(images=images, return_tensors="pt")
        pixels = {key: value for key, value in encoded.items() if key != "batch_num_images"}
        if self.name == miniatures.TARGET:  # patches of all pictures in one row: one row each
            shape = (len(images), -1, pixels["pixel_values"].shape[-1])
            pixels["pixel_values"] = pixels["pixel_values"].reshape(shape)
        return pixels

    def _images(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        chosen = {key: value[torch.tensor(indices)] for key, value in self._pixels.items()}
        if self.name == miniatures.TARGET:
            chosen["pixel_values"] = chosen["pixel_values"].flatten(0, 1)
        return chosen

    def _pad(self, rows: Sequence[list[tuple[list[int], list[int]]]]) -> dict[str, torch.Tensor]:
        made = padded(rows, self._tokenizer.pad_token_id)
        if self.name == miniatures.TARGET:
            made["mm_token_type_ids"] = (made["input_ids"] == self._processor.image_token_id).int()
        return made


def encode_text(tokenizer: Any, told: str, text: str) -> list[int]:
    """Encode a question about a scene told in words.

    Args:
        tokenizer: The language model's tokenizer.
        told: The scene.
        text: The question.

    Returns:
        Token ids, up to where the answer begins.
    """
    chat = [{"role": "user", "content": f"{told} {text}"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(rendered)["input_ids"]
    return ids


def encode_image(processor: Any, image: Any, text: str) -> Any:
    """Encode a question about a picture.

    Args:
        processor: The processor of a multimodal miniature.
        image: The picture.
        text: The question.

    Returns:
        The model's inputs, a batch of one.
    """
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(text=[rendered], images=[image], return_tensors="pt")
