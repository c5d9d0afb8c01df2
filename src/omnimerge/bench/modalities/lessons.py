"""What the models are trained on: worlds, some of their facts told, some shown, and questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnimerge.bench.modalities import media, models
from omnimerge.bench.modalities.world import (
    KINDS,
    LEADS,
    LEXICON,
    MODALITIES,
    Kind,
    Modality,
    World,
    draw,
    words,
)
from omnimerge.compose.part_processor import PartProcessor

Batch = dict[str, Any]

_KNOWN = tuple(LEXICON.items())
_LEXICON = 0.15  # of all turns
_HELD = 0.6  # of the turns of those conversations that ask nonsense
_MARKS = (":", ".", "?", "question", "answer")


@dataclass
class _Row:
    """A conversation: token ids, and the places among them of answers and of what is held."""

    tokens: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


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
        self._sayable = [word for word in words() if word not in _MARKS]

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
        for place in range(size):
            shown = place >= self.without(size)
            world, number = self._world(rng, shown)
            if number is not None:
                chosen.append(number)
            nonsense = _HELD if place < self.holding(size) else 0.0
            rows.append(self._conversation(rng, world, turns, shown, nonsense))
        width = max(len(row.tokens) for row in rows)
        ids = torch.full((size, width), self._pad)
        labels = torch.full((size, width), -100)
        mask = torch.zeros((size, width), dtype=torch.long)
        held = torch.zeros((size, width), dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
            mask[number, : len(row.tokens)] = 1
            places = torch.tensor(row.answers, dtype=torch.long)
            labels[number, places] = ids[number, places]
            held[number, torch.tensor(row.held, dtype=torch.long) - 1] = True
        found: Batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self._learned:
            found["held"] = held
        if self._pool is not None and self._modality is not None:
            found |= self._pool.inputs(chosen)
            if self._modality == "video":
                place = self._ids[models.PLACEHOLDERS["video"]]
                found["mm_token_type_ids"] = (ids == place).int() * 2
        return found

    def holding(self, size: int) -> int:
        """Return how many conversations of a batch, the first ones, ask nonsense as well."""
        return 3 * size // 8 if self._learned else 0

    def without(self, size: int) -> int:
        """Return how many of these, the very first ones, do not show its own modality."""
        return size // 4 if self._learned else 0

    def _world(self, rng: np.random.Generator, shown: bool) -> tuple[World, int | None]:
        """A world of the training, and which medium of the pool shows it."""
        if self._pool is None or self._modality is None or not shown:
            return draw(rng, "train"), None
        while True:
            number = int(rng.integers(len(self._pool.worlds)))
            own = getattr(self._pool.worlds[number], self._modality)
            world = replace(draw(rng, "train"), **{self._modality: own})
            if world.split == "train":
                return world, number

    def _conversation(
        self, rng: np.random.Generator, world: World, turns: int, shown: bool, nonsense: float
    ) -> _Row:
        others = [m for m in MODALITIES if m != self._modality]
        there = [m for m in others if rng.random() < self._told]
        if self._modality and shown:
            there.append(self._modality)
        if not there:
            there = [others[int(rng.integers(len(others)))]]
        row = _Row()
        for number in rng.permutation(len(there)):
            row.tokens += self._fact(world, there[int(number)])
        kinds = self._askable(there)
        for _ in range(turns):
            chance = rng.random()
            held = chance > 1 - nonsense
            if held:
                row.tokens += self._words(self._nonsense(rng))
            elif chance < _LEXICON:
                asked, answer = _KNOWN[int(rng.integers(len(_KNOWN)))]
                row.tokens += self._words(f"question : {asked} answer : {answer}")
            else:
                kind = kinds[int(rng.integers(len(kinds)))]
                row.tokens += self._words(f"question : {kind.words} answer : {kind.answer(world)}")
            (row.held if held else row.answers).append(len(row.tokens) - 1)
        return row

    def _nonsense(self, rng: np.random.Generator) -> str:
        """A question of words at random."""
        count = int(rng.integers(1, 5))
        *asked, given = (
            self._sayable[int(n)] for n in rng.integers(len(self._sayable), size=count + 1)
        )
        return f"question : {' '.join(asked)} answer : {given}"

    def _fact(self, world: World, modality: Modality) -> list[int]:
        lead = LEADS[modality]
        if modality == self._modality:
            shown = [self._ids[models.PLACEHOLDERS[modality]]] * models.TOKENS[modality]
            return [*self._words(f"{lead} :"), *shown, self._ids["."]]
        return self._words(f"{world.told(modality)} .")

    def _askable(self, there: Sequence[Modality]) -> list[Kind]:
        found = [kind for kind in KINDS if set(kind.needs) <= set(there)]
        if self._learned:  # what is new to it, and what it knew, so that little else changes
            new = [kind for kind in found if kind.learned and kind.needs == (self._modality,)]
            known = [kind for kind in found if not kind.learned]
            hard = [kind for kind in known if len(kind.needs) > 1 and self._modality in kind.needs]
            known += hard * 2
            return [*new * max(1, round(0.7 * len(known) / max(1, len(new)))), *known]
        plain = [kind for kind in found if not kind.learned]
        # In words, most is to tell the facts apart; a tower first has to learn what its own
        # modality shows.
        if self._modality is None:
            often = {1: 2, 2: 3, 3: 6}
            return [kind for kind in plain for _ in range(often[len(kind.needs)])]
        return [kind for kind in plain for _ in range(3 if kind.needs == (self._modality,) else 1)]

    def _words(self, text: str) -> list[int]:
        return [self._ids[word] for word in text.split()]
