"""Pictures with coloured objects on them, which VQA and Grounding ask about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from omnimerge.bench.capabilities.tasks.task import BACKGROUND, CELL, COLOURS, IMAGE_SIZE, STEPS

SHAPES = ("circle", "square", "triangle", "cross")

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in steps of the grid; right and bottom are the first step outside."""


@dataclass(frozen=True)
class Item:
    """One object: its colour, its shape, its left top corner, and how many steps it is wide."""

    colour: str
    shape: str
    left: int
    top: int
    size: int

    @property
    def name(self) -> str:
        """What it is called, such as ``red circle``."""
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> Box:
        """Where it is."""
        return self.left, self.top, self.left + self.size, self.top + self.size


@dataclass(frozen=True)
class Objects:
    """Objects that do not overlap; no two have the same colour and shape."""

    items: tuple[Item, ...]

    def tell(self) -> str:
        """Name every object with its box, from top to bottom.

        Returns:
            Such as ``red circle 1245, blue square 5072``.
        """
        ordered = sorted(self.items, key=lambda item: (item.top, item.left))
        return ", ".join(f"{item.name} {box_text(item.box)}" for item in ordered)

    def draw(self) -> Image.Image:
        """Draw the objects.

        Returns:
            The picture.
        """
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
        pen = ImageDraw.Draw(image)
        for item in self.items:
            _draw_item(pen, item)
        return image


def box_text(box: Box) -> str:
    """Write a box as a model answers it.

    Args:
        box: the box.

    Returns:
        Four digits: left, top, right, bottom.
    """
    return "".join(map(str, box))


def random_objects(
    rng: np.random.Generator, *, fewest: int, most: int, sizes: tuple[int, ...], apart: int = 1
) -> Objects:
    """Draw a picture's objects.

    Args:
        rng: source of every choice.
        fewest: the least number of objects.
        most: the largest.
        sizes: how wide one may be, in steps of the grid.
        apart: every object begins at a multiple of this.

    Returns:
        The objects, in random order.
    """
    number = int(rng.integers(fewest, most + 1))
    items: list[Item] = []
    while len(items) < number:
        size = int(rng.choice(sizes))
        places = rng.integers(0, (STEPS - size) // apart + 1, size=2)
        left, top = (apart * int(place) for place in places)
        colour = str(rng.choice(list(COLOURS)))
        shape = str(rng.choice(SHAPES))
        item = Item(colour, shape, left, top, size)
        if not any(item.name == other.name or overlap(item.box, other.box) for other in items):
            items.append(item)
    return Objects(tuple(items))


def overlap(one: Box, other: Box) -> int:
    """Measure what two boxes share.

    Args:
        one: a box.
        other: another one.

    Returns:
        Squares of the grid.
    """
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, wide) * max(0, high)


def _draw_item(pen: ImageDraw.ImageDraw, item: Item) -> None:
    left, top, right, bottom = (CELL * edge for edge in item.box)
    right, bottom = right - 1, bottom - 1
    ink = COLOURS[item.colour]
    middle, third = (left + right) / 2, (right - left) // 3
    if item.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=ink)
    elif item.shape == "square":
        pen.rectangle((left, top, right, bottom), fill=ink)
    elif item.shape == "triangle":
        pen.polygon([(middle, top), (right, bottom), (left, bottom)], fill=ink)
    else:
        pen.rectangle((left + third, top, right - third, bottom), fill=ink)
        pen.rectangle((left, top + third, right, bottom - third), fill=ink)
