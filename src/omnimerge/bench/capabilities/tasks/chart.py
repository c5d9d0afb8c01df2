"""Chart: values, extremes and differences of the bars of a bar chart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from omnimerge.bench.capabilities.tasks.task import (
    BACKGROUND,
    CELL,
    COLOURS,
    IMAGE_SIZE,
    Question,
    Task,
)

BARS = 4
HIGHEST = 7
_WIDTH = IMAGE_SIZE // BARS


@dataclass(frozen=True)
class Chart:
    """Bars from left to right: colour and value; no two have one colour."""

    bars: tuple[tuple[str, int], ...]

    def tell(self) -> str:
        """List the bars.

        Returns:
            Such as ``red 3, blue 5, green 1, black 6``.
        """
        return ", ".join(f"{name} {value}" for name, value in self.bars)

    def draw(self) -> Image.Image:
        """Draw the bars, each standing on the lower edge.

        Returns:
            The picture.
        """
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
        pen = ImageDraw.Draw(image)
        for place, (name, value) in enumerate(self.bars):
            left, top = place * _WIDTH + 2, IMAGE_SIZE - CELL * value
            pen.rectangle((left, top, left + _WIDTH - 5, IMAGE_SIZE - 1), fill=COLOURS[name])
        return image


def random_scene(rng: np.random.Generator) -> Chart:
    """Draw a chart.

    Args:
        rng: source of every choice.

    Returns:
        The scene.
    """
    names = rng.permutation(list(COLOURS))[:BARS]
    values = rng.integers(1, HIGHEST + 1, size=BARS)
    return Chart(tuple((str(n), int(v)) for n, v in zip(names, values, strict=True)))


def value(scene: Chart) -> list[Question]:
    """Ask for the value of a bar.

    Args:
        scene: the scene.

    Returns:
        A question per bar.
    """
    return [Question("value", f"value of {name}", str(found)) for name, found in scene.bars]


def highest(scene: Chart) -> list[Question]:
    """Ask which bar is the highest.

    Args:
        scene: the scene.

    Returns:
        One question, or none if two are as high.
    """
    return _extreme(scene, "highest", max(value for _, value in scene.bars))


def lowest(scene: Chart) -> list[Question]:
    """Ask which bar is the lowest.

    Args:
        scene: the scene.

    Returns:
        One question, or none if two are as low.
    """
    return _extreme(scene, "lowest", min(value for _, value in scene.bars))


def difference(scene: Chart) -> list[Question]:
    """Ask by how much one bar is higher than another.

    Args:
        scene: the scene.

    Returns:
        A question per pair that differs.
    """
    return [
        Question("difference", f"{name} minus {other}", str(more - less))
        for name, more in scene.bars
        for other, less in scene.bars
        if more > less
    ]


def _extreme(scene: Chart, kind: str, wanted: int) -> list[Question]:
    found = [name for name, value in scene.bars if value == wanted]
    return [Question(kind, f"what is {kind}", found[0])] if len(found) == 1 else []


TASK = Task(
    "chart",
    "values, extremes and differences in bar charts",
    {"value": value, "highest": highest, "lowest": lowest, "difference": difference},
    random_scene,
)
"""The task."""
