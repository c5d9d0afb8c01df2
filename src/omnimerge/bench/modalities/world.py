"""What is asked about: a picture, a sound and a moving shape, and questions that need some of them.

After MUSIC-AVQA and AVQA: questions about one modality, about two that have to be compared, and
about all three. Every fact can be told in words, which is how the base language model learns them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Modality = Literal["image", "audio", "video"]
Split = Literal["train", "val", "test"]

MODALITIES: tuple[Modality, ...] = ("image", "audio", "video")
LEADS = {"image": "picture", "audio": "sound", "video": "motion"}
"""The word before a medium, and in each fact that is told of it."""

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = ("one", "two", "three")
GLIDES = ("up", "down")
DIRECTIONS = ("up", "down", "left", "right")

_FACTS: Mapping[Modality, tuple[str, ...]] = {
    "image": (*COLOURS, *SHAPES, *COUNTS),
    "audio": (*GLIDES, *COUNTS),
    "video": (*COLOURS, *SHAPES, *DIRECTIONS),
}
_CORNERS = {"circle": "zero", "square": "four", "triangle": "three", "cross": "twelve"}
_OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}


@dataclass(frozen=True)
class World:
    """One picture, one sound and one video.

    Attributes:
        image: colour, shape and number of the things in the picture.
        audio: where each tone glides, and how many there are.
        video: colour and shape of what moves, and where to.
    """

    image: tuple[str, str, str]
    audio: tuple[str, str]
    video: tuple[str, str, str]

    @property
    def split(self) -> Split:
        """Where this world is asked about: eight of ten in training, one each in val and test."""
        place = zlib.crc32(" ".join((*self.image, *self.audio, *self.video)).encode()) % 10
        return "val" if place == 8 else "test" if place == 9 else "train"

    def told(self, modality: Modality) -> str:
        """Tell one modality in words, each of which says what it is about."""
        found: tuple[str, ...] = getattr(self, modality)
        return " ".join(f"{LEADS[modality]}-{value}" for value in found)


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        words: the question.
        needs: the modalities without which it cannot be answered.
        answer: what is right.
        learned: whether only the expert of its modality learns it, and not the base.
    """

    words: str
    needs: tuple[Modality, ...]
    answer: Callable[[World], str]
    learned: bool = False


def _yes(same: bool) -> str:
    return "yes" if same else "no"


def _warmth(colour: str) -> str:
    return "warm" if colour in ("red", "yellow") else "cool"


def _parity(count: str) -> str:
    return "even" if count == "two" else "odd"


def _light(way: str) -> str:
    return "bright" if way == "up" else "dark"


def _axis(way: str) -> str:
    return "vertical" if way in GLIDES else "horizontal"


KINDS: tuple[Kind, ...] = (
    Kind("which shape in picture", ("image",), lambda w: w.image[1]),
    Kind("which colour in picture", ("image",), lambda w: w.image[0]),
    Kind("how many in picture", ("image",), lambda w: w.image[2]),
    Kind("angles of picture", ("image",), lambda w: _CORNERS[w.image[1]], learned=True),
    Kind("heat of picture", ("image",), lambda w: _warmth(w.image[0]), learned=True),
    Kind("where does sound go", ("audio",), lambda w: w.audio[0]),
    Kind("how many in sound", ("audio",), lambda w: w.audio[1]),
    Kind("parity of sound", ("audio",), lambda w: _parity(w.audio[1]), learned=True),
    Kind("light of sound", ("audio",), lambda w: _light(w.audio[0]), learned=True),
    Kind("which shape moves", ("video",), lambda w: w.video[1]),
    Kind("which colour moves", ("video",), lambda w: w.video[0]),
    Kind("which way it moves", ("video",), lambda w: w.video[2]),
    Kind("back of motion", ("video",), lambda w: _OPPOSITE[w.video[2]], learned=True),
    Kind("line of motion", ("video",), lambda w: _axis(w.video[2]), learned=True),
    Kind("same shape", ("image", "video"), lambda w: _yes(w.image[1] == w.video[1])),
    Kind("same colour", ("image", "video"), lambda w: _yes(w.image[0] == w.video[0])),
    Kind("same number", ("image", "audio"), lambda w: _yes(w.image[2] == w.audio[1])),
    Kind("same way", ("audio", "video"), lambda w: _yes(w.audio[0] == w.video[2])),
    Kind("shape by sound", MODALITIES, lambda w: (w.image if w.audio[0] == "up"
         else w.video)[1]),
    Kind("colour by sound", MODALITIES, lambda w: (w.image if w.audio[0] == "up"
         else w.video)[0]),
)  # fmt: skip
"""*By sound*: the picture's where the sound goes up, that of what moves where it goes down.

What experts learn is asked in words that the base knows, and no two of them learn about the same
one: a word that two learn makes each answer for the other, and one that the base does not know is
nothing in particular to the others, so that their changes answer it at random.
"""

LEXICON: Mapping[str, str] = {
    **{f"angles of {shape}": number for shape, number in _CORNERS.items()},
    **{f"heat of {colour}": _warmth(colour) for colour in COLOURS},
    **{f"parity of {count}": _parity(count) for count in COUNTS},
    **{f"light of {way}": _light(way) for way in GLIDES},
    **{f"back of {way}": back for way, back in _OPPOSITE.items()},
    **{f"line of {way}": _axis(way) for way in DIRECTIONS},
}
"""What the language model knows of words alone: question -> answer.

The experts' new kinds of question ask for the same of what is shown.
"""

COLUMNS = ("image", "audio", "video", "two", "three")
"""Questions about one modality each, about two at once, and about all three."""


def column(kind: Kind) -> str:
    """Return the column of the table that a kind of question belongs to."""
    return {1: kind.needs[0], 2: "two", 3: "three"}[len(kind.needs)]


@dataclass(frozen=True)
class Question:
    """One question about one world.

    Attributes:
        world: what it is about.
        kind: what is asked.
    """

    world: World
    kind: Kind

    @property
    def answer(self) -> str:
        """The right answer, one word."""
        return self.kind.answer(self.world)


def words() -> list[str]:
    """List every word of facts, questions and answers, in a fixed order."""
    told = "picture : sound motion . question ? answer yes no"
    values = (*COLOURS, *SHAPES, *COUNTS, *DIRECTIONS, *_CORNERS.values(), "warm", "cool", "even",
              "odd", "bright", "dark", "vertical", "horizontal")  # fmt: skip
    asked = [word for kind in KINDS for word in kind.words.split()]
    known = [word for each in LEXICON for word in each.split()]
    facts = [f"{LEADS[modality]}-{value}" for modality, found in _FACTS.items() for value in found]
    return list(dict.fromkeys([*told.split(), *values, *asked, *known, *facts]))


def draw(rng: np.random.Generator, split: Split, kind: Kind | None = None) -> World:
    """Draw a world of a split.

    Args:
        rng: where chance comes from.
        split: which worlds.
        kind: a question whose answers should be about equally frequent, if it is a yes or no.

    Returns:
        The world.
    """
    wanted = bool(rng.integers(2)) if kind and len(kind.needs) == 2 else None
    while True:
        found = World(
            (_one(rng, COLOURS), _one(rng, SHAPES), _one(rng, COUNTS)),
            (_one(rng, GLIDES), _one(rng, COUNTS)),
            (_one(rng, COLOURS), _one(rng, SHAPES), _one(rng, DIRECTIONS)),
        )
        fits = wanted is None or kind is None or (kind.answer(found) == "yes") == wanted
        if found.split == split and fits:
            return found


def _one(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]


def questions(seed: int, split: Split, count: int) -> dict[str, list[Question]]:
    """Draw the questions of a split, as many of each kind of a column.

    Args:
        seed: of the line.
        split: `val` or `test`.
        count: questions per column.

    Returns:
        Column -> questions.
    """
    rng = np.random.default_rng([seed, *split.encode()])
    found: dict[str, list[Question]] = {name: [] for name in COLUMNS}
    by_column: Mapping[str, list[Kind]] = {
        name: [kind for kind in KINDS if column(kind) == name] for name in COLUMNS
    }
    for name, kinds in by_column.items():
        for number in range(count):
            kind = kinds[number % len(kinds)]
            found[name].append(Question(draw(rng, split, kind), kind))
    return found
