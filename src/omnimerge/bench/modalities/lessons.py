"""What the models are trained on: worlds, some of their facts told, some shown, and questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnimerge.bench.modalities import media, models
from omnimerge.bench.modalities.world import KINDS, MODALITIES, Kind, Modality, World, draw
from omnimerge.compose.part_processor import PartProcessor

Batch = dict[str, Any]


class Pool:
    """Media of one modality, processed once.

    Args:
        modality: which.
        folder: a checkpoint with the processor.
        seed: of worlds and media.
        size: how many.
    """

    def __init__(self, modality: Modality, folder: Path, *, seed: int, size: int) -> None:
        rng = np.random.default_rng([seed, *modality.encode()])
        self.modality = modality
        self.worlds = [draw(rng, "train") for _ in range(size)]
        processor = PartProcessor.load(folder, {modality: models.PLACEHOLDERS[modality]}, {})
        made = [media.make(world, modality, rng) for world in self.worlds]
        rows, inputs = processor.encode({modality: made})
        if any(len(row) != models.TOKENS[modality] for row in rows[modality]):
            raise ValueError(f"a medium of {modality} has an unexpected number of tokens")
        self._each = {
            name: value.reshape(size, -1, *value.shape[1:]) for name, value in inputs.items()
        }

    def inputs(self, chosen: Sequence[int]) -> Batch:
        """Return the model's inputs for some media."""
        index = torch.as_tensor(list(chosen))
        return {name: value[index].flatten(0, 1) for name, value in self._each.items()}


class Lessons:
    """Batches of conversations.

    Args:
        modality: what is shown and not told; None for the language model.
        pool: the media of that modality.
        told: how likely each other fact is told in words.
        learned: whether the kinds that only this expert learns are asked as well.
    """

    def __init__(
        self, modality: Modality | None, pool: Pool | None, *, told: float, learned: bool
    ) -> None:
        self._modality = modality
        self._pool = pool
        self._told = told
        self._learned = learned
        names = models.vocabulary(modality or models.LLM)
        self._ids: dict[str, int] = names.get_vocab()
        self._pad = int(names.pad_token_id)

    def batch(self, rng: np.random.Generator, size: int, turns: int = 4) -> Batch:
        """Draw a batch.

        Args:
            rng: where chance comes from.
            size: conversations.
            turns: questions in each.

        Returns:
            The model's inputs with labels, padded on the right.
        """
        rows, chosen = [], []
        for _ in range(size):
            world = draw(rng, "train")
            if self._pool is not None:
                number = int(rng.integers(len(self._pool.worlds)))
                world = self._mixed(world, self._pool.worlds[number])
                chosen.append(number)
            rows.append(self._conversation(rng, world, turns))
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((size, width), self._pad)
        labels = torch.full((size, width), -100)
        mask = torch.zeros((size, width), dtype=torch.long)
        for number, (tokens, answers) in enumerate(rows):
            ids[number, : len(tokens)] = torch.tensor(tokens)
            mask[number, : len(tokens)] = 1
            places = torch.tensor(answers)
            labels[number, places] = ids[number, places]
        found: Batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self._pool is not None and self._modality is not None:
            found |= self._pool.inputs(chosen)
            if self._modality == "video":
                place = self._ids[models.PLACEHOLDERS["video"]]
                found["mm_token_type_ids"] = (ids == place).int() * 2
        return found

    def _mixed(self, world: World, shown: World) -> World:
        facts = {kind: getattr(world, kind) for kind in MODALITIES}
        kind = self._modality or "image"
        return World(**{**facts, kind: getattr(shown, kind)})

    def _conversation(
        self, rng: np.random.Generator, world: World, turns: int
    ) -> tuple[list[int], list[int]]:
        """Token ids, and the places of answers among them."""
        there = [m for m in MODALITIES if m == self._modality or rng.random() < self._told]
        if not there:
            there = [MODALITIES[int(rng.integers(3))]]
        tokens: list[int] = []
        for number in rng.permutation(len(there)):
            tokens += self._fact(world, there[int(number)])
        kinds = self._askable(there)
        places = []
        for _ in range(turns):
            kind = kinds[int(rng.integers(len(kinds)))]
            tokens += self._words(f"question : {kind.words} answer : {kind.answer(world)}")
            places.append(len(tokens) - 1)
        return tokens, places

    def _fact(self, world: World, modality: Modality) -> list[int]:
        lead = self._words(f"{models.LEADS[modality]} :")
        if modality == self._modality:
            shown = [self._ids[models.PLACEHOLDERS[modality]]] * models.TOKENS[modality]
        else:
            shown = self._words(world.told(modality))
        return [*lead, *shown, self._ids["."]]

    def _askable(self, there: Sequence[Modality]) -> list[Kind]:
        found = [kind for kind in KINDS if set(kind.needs) <= set(there)]
        if self._learned:  # what is new to it, and what it knew, so that little else changes
            new = [kind for kind in found if kind.learned and kind.needs == (self._modality,)]
            known = [kind for kind in found if not kind.learned]
            return [*new * math.ceil(len(known) / len(new)), *known]
        plain = [kind for kind in found if not kind.learned]
        # What needs more of the facts is harder in words, and asked more often there; a tower
        # first has to learn what its own modality shows.
        if self._modality is None:
            return [kind for kind in plain for _ in range(len(kind.needs) ** 2)]
        return [kind for kind in plain for _ in range(3 if kind.needs == (self._modality,) else 1)]

    def _words(self, text: str) -> list[int]:
        return [self._ids[word] for word in text.split()]
