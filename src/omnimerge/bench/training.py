"""Train the three miniatures, from a seed, on generated scenes.

The language model learns the shared kinds of question in words. Each multimodal model then learns
to see in front of the frozen language model (stage 1), and last the language model itself learns
three more kinds of question, other ones in each (stage 2).
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnimerge.bench import miniatures, scenes
from omnimerge.errors import CheckpointError

IGNORED = -100  # what transformers' loss leaves out


@dataclass(frozen=True)
class Stage:
    """One stage of training: what is asked, what may change, and how long.

    Attributes:
        name: For progress messages, and to give each stage its own random numbers.
        kinds: Kind of question to its share of the batch.
        steps: Number of optimiser steps.
        rate: Peak learning rate, reached after a warm-up and followed by a cosine decay.
        tower: Whether the vision tower and the projector learn.
        llm: Whether the language model learns.
        batch: Conversations in a step, each about one scene.
        turns: Questions in a conversation.
        decay: AdamW's weight decay.
    """

    name: str
    kinds: Mapping[str, float]
    steps: int
    rate: float
    tower: bool = True
    llm: bool = True
    batch: int = 24
    turns: int = 4
    decay: float = 0.01


def _shares(kinds: Sequence[str], total: float = 1.0) -> dict[str, float]:
    return {kind: total / len(kinds) for kind in kinds}


READ = Stage(
    "read",
    _shares(scenes.SHARED_KINDS, 0.7) | {scenes.EXERCISE: 0.3},
    steps=3000,
    rate=1e-3,
    batch=12,
)
"""The language model learns to answer about scenes told in words."""

SEE = Stage("see", _shares(scenes.SHARED_KINDS), steps=1000, rate=1e-3, llm=False)
"""Stage 1: tower and projector learn in front of the frozen language model."""

LEARN = {
    miniatures.TARGET: Stage(
        "learn",
        _shares(scenes.TARGET_KINDS, 0.6) | _shares(scenes.SHARED_KINDS, 0.4),
        steps=600,
        rate=3e-4,
        tower=False,
    ),
    miniatures.DONOR: Stage(
        "learn",
        _shares(scenes.DONOR_KINDS, 0.6) | _shares(scenes.SHARED_KINDS, 0.4),
        steps=600,
        rate=3e-4,
        tower=False,
    ),
}
"""Stage 2: the language model learns the new kinds, and rehearses the shared ones."""

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
        self.scenes = [scenes.random_scene(rng, fewest=1) for _ in range(size)]
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
        padded = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.name == miniatures.TARGET:
            padded["mm_token_type_ids"] = (ids == self._processor.image_token_id).int()
        return padded


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


def train(
    model: Any,
    lessons: Lessons,
    stage: Stage,
    *,
    seed: int,
    on_progress: Callable[[str], None] | None = None,
) -> float:
    """Run one stage of training, in place.

    Args:
        model: The model.
        lessons: Its examples.
        stage: What to learn.
        seed: Same seed, same order of examples.
        on_progress: Told the loss now and then.

    Returns:
        The mean loss of the last fifty steps.
    """
    for key, weight in model.named_parameters():
        weight.requires_grad_(stage.llm if is_llm(key) else stage.tower)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(
        learning, lr=stage.rate, betas=(0.9, 0.98), weight_decay=stage.decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _warmth(step, stage.steps))
    rng = np.random.default_rng([seed, *stage.name.encode(), *lessons.name.encode()])
    model.train()
    losses: list[float] = []
    for step in range(stage.steps):
        loss = model(**lessons.batch(rng, stage), use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if on_progress is not None and (step + 1) % 250 == 0:
            recent = sum(losses[-50:]) / 50
            on_progress(f"{lessons.name} {stage.name} {step + 1}/{stage.steps} loss {recent:.4f}")
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


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
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=_one_thread) as pool:
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


def _one_thread() -> None:
    torch.set_num_threads(1)


def build_llm(folder: Path, *, seed: int) -> str:
    """Train and save the language model.

    Args:
        folder: The checkpoint to write.
        seed: Of weights and lessons.

    Returns:
        A line about the last loss.
    """
    model = miniatures.model(miniatures.LLM, seed=seed)
    loss = train(model, Lessons(miniatures.LLM, seed=seed), READ, seed=seed)
    miniatures.save(miniatures.LLM, model, folder)
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
