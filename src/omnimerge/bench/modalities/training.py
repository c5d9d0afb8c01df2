"""Train the line: the language model in words, the towers before it, then an expert of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnimerge.bench import teaching
from omnimerge.bench.adapters import with_adapter
from omnimerge.bench.modalities import models
from omnimerge.bench.modalities.lessons import Batch, Lessons, Pool
from omnimerge.bench.modalities.places import ADAPTERS, TOWERS
from omnimerge.bench.modalities.world import MODALITIES, Modality
from omnimerge.bench.teaching import train

Report = Callable[[str], None]


@dataclass(frozen=True)
class Stage(teaching.Stage):
    """One stage of training.

    Attributes:
        weakest: each step uses a random share of what the adapter adds, from this to all of it, so
            that what is learned outlasts the scales of merges.
    """

    batch: int = 16
    turns: int = 6
    weakest: float = 1.0


@dataclass(frozen=True)
class Preset:
    """How long everything is trained, and how much is asked.

    Attributes:
        read: the language model learns to answer about facts in words.
        see: a tower and its projector learn before the frozen language model.
        learn: the expert's adapter learns the questions that are its own.
        rank: of the adapter.
        pool: media per modality that are trained on.
        val: questions per column for choosing.
        test: questions per column that are reported.
    """

    read: Stage
    see: Stage
    learn: Stage
    rank: int
    pool: int
    val: int
    test: int


PRESETS = {
    "quick": Preset(
        read=Stage(1200, 3e-3),
        see=Stage(400, 3e-3),
        learn=Stage(250, 4e-3, weakest=0.3),
        rank=16,
        pool=600,
        val=60,
        test=120,
    ),
    "full": Preset(
        read=Stage(5000, 3e-3),
        see=Stage(2000, 3e-3),
        learn=Stage(800, 2e-3, weakest=0.3),
        rank=16,
        pool=2000,
        val=120,
        test=300,
    ),
}
"""`full` takes about twenty minutes on one core, `quick` about two and a half."""


def steps(
    folder: Path, preset: Preset, *, seed: int, report: Report
) -> list[tuple[str, Callable[[Path], None]]]:
    """List what is trained, in order.

    Args:
        folder: of the line.
        preset: how long.
        seed: of everything that is drawn.
        report: told the losses.

    Returns:
        Pairs of a place inside `folder` and what writes it, given where to.
    """
    found: list[tuple[str, Callable[[Path], None]]] = [
        (models.LLM, lambda out: build_llm(out, preset, seed=seed, report=report))
    ]
    for modality in MODALITIES:
        tower, adapter = folder / TOWERS / modality, folder / ADAPTERS / modality
        found += [
            (f"{TOWERS}/{modality}", partial(
                build_tower, modality, llm=folder / models.LLM, preset=preset, seed=seed,
                report=report)),
            (f"{ADAPTERS}/{modality}", partial(
                build_adapter, modality, tower=tower, preset=preset, seed=seed, report=report)),
            (modality, partial(fold, modality, tower=tower, adapter=adapter)),
        ]  # fmt: skip
    return found


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
    loss = _teach(model, lessons, preset.read, list(model.parameters()), [seed, 1])
    models.save(models.LLM, model, folder)
    report(f"{models.LLM}: loss {loss:.4f}")


def build_tower(
    modality: Modality, folder: Path, *, llm: Path, preset: Preset, seed: int, report: Report
) -> None:
    """Train and save a tower and its projector, before the frozen language model.

    Args:
        modality: what it sees or hears.
        folder: the checkpoint to write.
        llm: the language model's checkpoint.
        preset: how long.
        seed: of weights, media and lessons.
        report: told the loss.
    """
    model = models.new(modality, seed=seed)
    _put_llm(model, llm)
    models.save(modality, model, folder)  # the processor is read from there
    pool = Pool(modality, folder, seed=seed, size=preset.pool)
    inside = {id(weight) for weight in _llm_weights(model)}
    tower = [weight for weight in model.parameters() if id(weight) not in inside]
    lessons = Lessons(modality, pool, told=0.3, learned=False)
    loss = _teach(model, lessons, preset.see, tower, [seed, _number(modality), 1])
    models.save(modality, model, folder)
    report(f"{modality}: loss {loss:.4f} before the frozen language model")


def build_adapter(
    modality: Modality, folder: Path, *, tower: Path, preset: Preset, seed: int, report: Report
) -> None:
    """Train and save what is the expert's own: a LoRA adapter of the language model.

    Args:
        modality: what it sees or hears.
        folder: the adapter's, to write.
        tower: the checkpoint with the tower before the base's language model.
        preset: how long.
        seed: of weights, media and lessons.
        report: told the loss.
    """
    pool = Pool(modality, tower, seed=seed, size=preset.pool)
    generator = torch.Generator().manual_seed(seed * 10007 + _number(modality))
    model = with_adapter(
        models.load(modality, tower),
        rank=preset.rank,
        matrices=r".*language_model\.layers\..*_proj",
        draw=lambda _: generator,
    )
    lessons = Lessons(modality, pool, told=0.7, learned=True)
    learning = [weight for key, weight in model.named_parameters() if "lora_" in key]
    held = partial(_held, model, preset.learn, lessons.without(preset.learn.batch))
    numbers = [seed, _number(modality), 2]
    loss = _teach(model, lessons, preset.learn, learning, numbers, held)
    model.save_pretrained(str(folder))
    report(f"{modality}: loss {loss:.4f} with an adapter")


def fold(modality: Modality, folder: Path, *, tower: Path, adapter: Path) -> None:
    """Save an expert as one checkpoint, its adapter put into its language model.

    Args:
        modality: what it sees or hears.
        folder: the checkpoint to write.
        tower: the checkpoint with the tower.
        adapter: what goes into it.
    """
    import peft

    model = peft.PeftModel.from_pretrained(models.load(modality, tower), str(adapter))
    models.save(modality, model.merge_and_unload(), folder)


def _number(modality: Modality) -> int:
    return 2 + MODALITIES.index(modality)


def _put_llm(model: Any, folder: Path) -> None:
    from transformers import Qwen2ForCausalLM

    llm = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_decoder().load_state_dict(llm.model.state_dict())
    model.get_output_embeddings().load_state_dict(llm.lm_head.state_dict())


def _llm_weights(model: Any) -> list[torch.nn.Parameter]:
    return [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]


def _teach(
    model: Any,
    lessons: Lessons,
    stage: Stage,
    learning: Sequence[torch.nn.Parameter],
    seed: Sequence[int],
    loss: Callable[[Batch, np.random.Generator], torch.Tensor] | None = None,
) -> float:
    """Run a stage, on batches of its size."""
    return train(
        model,
        stage,
        lambda rng: lessons.batch(rng, stage.batch, stage.turns),
        learning=learning,
        seed=seed,
        loss=loss,
    )


_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")


def _held(
    model: Any, stage: Stage, without: int, batch: Batch, rng: np.random.Generator
) -> torch.Tensor:
    """Loss of answers, and distance from the base where answers are to stay.

    The first `without` conversations show nothing.
    """
    held = batch.pop("held")
    strength = float(rng.uniform(stage.weakest, 1.0))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    _scale(layers, strength)
    found = model(**batch, use_cache=False)
    if not bool(held.any()):
        _scale(layers, 1.0)
        plain_loss: torch.Tensor = found.loss
        return plain_loss
    _scale(layers, 0.0)
    with torch.no_grad():
        rows = max(without, int(held.any(dim=1).nonzero().max())) + 1
        plain = {
            name: value[:rows]
            if name in _TEXT
            else value[: len(value) // (len(held) - without) * (rows - without)]
            for name, value in batch.items()
            if name != "labels"
        }
        before = model(**plain, use_cache=False).logits[held[:rows]].log_softmax(dim=-1)
    _scale(layers, 1.0)
    after = found.logits[held].log_softmax(dim=-1)
    apart = torch.nn.functional.kl_div(after, before, log_target=True, reduction="batchmean")
    loss: torch.Tensor = found.loss + apart
    return loss


def _scale(layers: Sequence[Any], strength: float) -> None:
    for layer in layers:
        for name in layer.scaling:
            layer.scaling[name] = strength
