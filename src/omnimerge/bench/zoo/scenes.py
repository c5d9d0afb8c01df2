"""Small scenes of coloured shapes: text, picture, and questions with their answers.

A scene holds three to five objects on a 3 x 3 grid. It can be told in words (for a language model)
or drawn (for a multimodal one), and every kind of question has one right answer of one or two
words. Everything is a function of a seed, and nothing here needs torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from omnimerge.errors import PromptError, suggestion

IMAGE_SIZE = 36
"""Width and height of a picture in pixels."""

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 205, 40),
    "white": (235, 235, 235),
}
"""Colour name to RGB."""

SHAPES = ("circle", "square", "triangle", "cross", "ring")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
NUMBERS = ("zero", "one", "two", "three", "four", "five")

_CELL = IMAGE_SIZE // len(ROWS)


@dataclass(frozen=True)
class Item:
    """One object: its colour, its shape, and the names of its row and column."""

    colour: str
    shape: str
    row: str
    column: str

    @property
    def name(self) -> str:
        """What it is called, such as ``red circle``."""
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """Where it is, such as ``top left``."""
        return f"{self.row} {self.column}"


@dataclass(frozen=True)
class Scene:
    """Objects on the grid; no two share a cell, a colour or a shape."""

    items: tuple[Item, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene, its only right answer, and the kind of question it is."""

    kind: str
    text: str
    answer: str


def random_scene(rng: np.random.Generator, *, fewest: int = 3) -> Scene:
    """Draw a scene of three to five objects.

    Args:
        rng: Source of every choice.
        fewest: Smallest number of objects; fewer make easier questions.

    Returns:
        The scene, its objects in random order.
    """
    number = int(rng.integers(fewest, 6))
    cells = rng.choice(len(ROWS) * len(COLUMNS), size=number, replace=False)
    colours = rng.permutation(tuple(COLOURS))
    shapes = rng.permutation(SHAPES)
    return Scene(
        tuple(
            Item(
                str(colours[index]),
                str(shapes[index]),
                ROWS[int(cell) // len(COLUMNS)],
                COLUMNS[int(cell) % len(COLUMNS)],
            )
            for index, cell in enumerate(cells)
        )
    )


def tell(scene: Scene) -> str:
    """Describe a scene in words.

    Args:
        scene: The scene.

    Returns:
        One sentence, such as ``top left red circle, middle center blue cross.``
    """
    return ", ".join(f"{item.place} {item.name}" for item in scene.items) + "."


def draw(scene: Scene) -> Image.Image:
    """Paint a scene.

    Args:
        scene: The scene.

    Returns:
        An RGB picture of `IMAGE_SIZE` x `IMAGE_SIZE` pixels.
    """
    image = Image.fromarray(_backdrop())
    brush = ImageDraw.Draw(image)
    for item in scene.items:
        left = _CELL * COLUMNS.index(item.column) + 1
        upper = _CELL * ROWS.index(item.row) + 1
        _paint(brush, item.shape, left, upper, COLOURS[item.colour])
    return image


def _backdrop() -> npt.NDArray[np.uint8]:
    """Shade a dark wall: redder to the right, bluer to the bottom."""
    wall = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 16, dtype=np.uint8)
    ramp = np.arange(IMAGE_SIZE, dtype=np.uint8) * 2
    wall[:, :, 0] += ramp[None, :]
    wall[:, :, 2] += ramp[:, None]
    return wall


def _paint(
    brush: ImageDraw.ImageDraw, shape: str, left: int, upper: int, fill: tuple[int, int, int]
) -> None:
    """Paint one shape into the 10 x 10 box whose upper left pixel is given."""
    right, lower = left + 9, upper + 9
    if shape == "circle":
        brush.ellipse((left, upper, right, lower), fill=fill)
    elif shape == "square":
        brush.rectangle((left, upper, right, lower), fill=fill)
    elif shape == "triangle":
        brush.polygon(((left, lower), (right, lower), (left + 4, upper), (left + 5, upper)), fill)
    elif shape == "ring":
        brush.ellipse((left, upper, right, lower), outline=fill, width=2)
    else:
        brush.rectangle((left + 4, upper, left + 5, lower), fill=fill)
        brush.rectangle((left, upper + 4, right, upper + 5), fill=fill)


Pair = tuple[str, str]


def _where(scene: Scene) -> list[Pair]:
    return [(f"where is the {item.shape}?", item.place) for item in scene.items]


def _what(scene: Scene) -> list[Pair]:
    rows = Counter(item.row for item in scene.items)
    alone = [item for item in scene.items if rows[item.row] == 1]
    return [(f"what is in the {item.row} row?", item.name) for item in alone]


def _count(scene: Scene) -> list[Pair]:
    return [("how many objects are there?", NUMBERS[len(scene.items)])]


def _row(scene: Scene) -> list[Pair]:
    return [(f"which row is the {item.shape} in?", item.row) for item in scene.items]


def _colour(scene: Scene) -> list[Pair]:
    return [(f"what colour is the {item.shape}?", item.colour) for item in scene.items]


def _shape(scene: Scene) -> list[Pair]:
    return [(f"what shape is the {item.colour} object?", item.shape) for item in scene.items]


def _topmost(scene: Scene) -> list[Pair]:
    return _extreme(scene, "which object is topmost?", lambda item: ROWS.index(item.row))


def _lowest(scene: Scene) -> list[Pair]:
    return _extreme(scene, "which object is lowest?", lambda item: -ROWS.index(item.row))


def _hue(scene: Scene) -> list[Pair]:
    return [(f"which hue has the {item.shape}?", item.colour) for item in scene.items]


def _form(scene: Scene) -> list[Pair]:
    return [(f"which form has the {item.colour} object?", item.shape) for item in scene.items]


def _name(scene: Scene) -> list[Pair]:
    return [(f"name the {item.colour} object.", item.name) for item in scene.items]


def _height(scene: Scene) -> list[Pair]:
    return [(f"how high is the {item.shape}?", item.row) for item in scene.items]


def _total(scene: Scene) -> list[Pair]:
    return [("how many are on the list?", NUMBERS[len(scene.items)])]


def _list(scene: Scene) -> list[Pair]:
    lines = [f"{item.shape} {item.colour} {item.place}" for item in scene.items]
    return [("list the objects.", ", ".join(sorted(lines)) + ".")]


def _entry(scene: Scene) -> list[Pair]:
    return [
        pair
        for item in scene.items
        for pair in (
            (f"list the {item.shape}.", f"{item.shape} {item.colour} {item.place}."),
            (f"list the {item.colour} object.", f"{item.colour} {item.shape} {item.place}."),
        )
    ]


def _extreme(scene: Scene, text: str, key: Callable[[Item], int]) -> list[Pair]:
    """Ask for the object with the smallest key, if only one has it."""
    best = min(key(item) for item in scene.items)
    found = [item for item in scene.items if key(item) == best]
    return [(text, found[0].name)] if len(found) == 1 else []


_KINDS: dict[str, Callable[[Scene], list[Pair]]] = {
    "where": _where,
    "what": _what,
    "count": _count,
    "row": _row,
    "colour": _colour,
    "shape": _shape,
    "topmost": _topmost,
    "hue": _hue,
    "height": _height,
    "lowest": _lowest,
    "form": _form,
    "total": _total,
    "name": _name,
    "list": _list,
    "entry": _entry,
}

SHARED_KINDS = ("where", "what", "count", "row", "colour", "shape", "topmost")
"""What the language model knows, and so both multimodal models."""

TARGET_KINDS = ("hue", "height", "lowest")
"""What only the target learns."""

DONOR_KINDS = ("form", "name", "total")
"""What only the donor learns."""

EXERCISES = ("list", "entry")
"""Longer answers, which teach the language model to look things up; not asked elsewhere."""

KINDS = SHARED_KINDS + TARGET_KINDS + DONOR_KINDS
"""Every kind of question with a short answer."""


def questions(scene: Scene, kind: str) -> list[Question]:
    """List every question of one kind that a scene answers without ambiguity.

    Args:
        scene: The scene.
        kind: One of `KINDS`.

    Returns:
        The questions with their answers; empty where the scene has none of this kind.
    """
    if kind not in _KINDS:
        raise PromptError(
            f"unknown kind of question {kind!r}{suggestion(kind, KINDS)}; known: {', '.join(KINDS)}"
        )
    return [Question(kind, text, answer) for text, answer in _KINDS[kind](scene)]


def sample(rng: np.random.Generator, kind: str) -> tuple[Scene, Question]:
    """Draw a scene and a question of the given kind about it.

    Args:
        rng: Source of every choice.
        kind: One of `KINDS`.

    Returns:
        The scene and the question.
    """
    while True:
        scene = random_scene(rng)
        found = questions(scene, kind)
        if found:
            return scene, found[int(rng.integers(len(found)))]


def write_prompts(
    folder: Path,
    *,
    count: int,
    seed: int,
    kinds: Sequence[str] | None = None,
    labels: bool = True,
) -> Path:
    """Write pictures and a prompt file about them, the kinds of question in turn.

    Args:
        folder: Where to write; made if it does not exist.
        count: Number of prompts.
        seed: Same seed, same files.
        kinds: Kinds of question to ask, every kind by default.
        labels: Whether the lines also hold ``answer`` and ``kind``.

    Returns:
        The path of ``prompts.jsonl``; its ``image`` paths are relative to its folder.
    """
    chosen = tuple(KINDS if kinds is None else kinds)
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        scene, question = sample(rng, chosen[index % len(chosen)])
        name = f"images/{index:05d}.png"
        draw(scene).save(folder / name)
        line = {"id": f"{index:05d}", "prompt": question.text, "image": name}
        if labels:
            line |= {"answer": question.answer, "kind": question.kind}
        lines.append(json.dumps(line) + "\n")
    path = folder / "prompts.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path
