"""Geometry: sides, area and perimeter of a rectangle, and angles between two rays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from omnimerge.bench.capabilities.tasks.task import (
    BACKGROUND,
    CELL,
    COLOURS,
    IMAGE_SIZE,
    STEPS,
    Question,
    Task,
)

ANGLES = (30, 60, 90, 120, 150)
"""Degrees."""

_LONGEST = 6
_MOST = 3  # steps from the edges
_INKS = tuple(name for name in COLOURS if name != "yellow")
_RAY = 20  # pixels


@dataclass(frozen=True)
class Rectangle:
    """The outline of a rectangle; numbers are steps of the grid, from the left top corner."""

    left: int
    top: int
    width: int
    height: int
    ink: str = "black"

    def tell(self) -> str:
        """Say how wide and high it is.

        Returns:
            Such as ``rectangle 3 by 5``.
        """
        return f"rectangle {self.width} by {self.height}"

    def draw(self) -> Image.Image:
        """Draw it.

        Returns:
            The picture.
        """
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
        left, top = CELL * self.left, CELL * self.top
        corners = (left, top, left + CELL * self.width - 1, top + CELL * self.height - 1)
        ImageDraw.Draw(image).rectangle(corners, outline=COLOURS[self.ink], width=2)
        return image


@dataclass(frozen=True)
class Angle:
    """Two rays from one point, in degrees: what is between them, and where the first points."""

    degrees: int
    turned: int

    def tell(self) -> str:
        """Say how large it is.

        Returns:
            Such as ``angle 60``.
        """
        return f"angle {self.degrees}"

    def draw(self) -> Image.Image:
        """Draw it, the point in the middle.

        Returns:
            The picture.
        """
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
        pen = ImageDraw.Draw(image)
        middle = IMAGE_SIZE / 2
        for direction in (self.turned, self.turned + self.degrees):
            turn = math.radians(direction)
            end = (middle + _RAY * math.cos(turn), middle - _RAY * math.sin(turn))
            pen.line([(middle, middle), end], fill=COLOURS["black"], width=2)
        return image


def random_scene(rng: np.random.Generator) -> Rectangle | Angle:
    """Draw a rectangle, or one time in four an angle.

    Args:
        rng: source of every choice.

    Returns:
        The scene.
    """
    if rng.random() < 0.25:
        return Angle(int(rng.choice(ANGLES)), int(rng.integers(0, 360)))
    width, height = (int(side) for side in rng.integers(2, _LONGEST + 1, size=2))
    left, top = (int(rng.integers(0, min(_MOST, STEPS - side) + 1)) for side in (width, height))
    return Rectangle(left, top, width, height, str(rng.choice(_INKS)))


def angle(scene: Rectangle | Angle) -> list[Question]:
    """Ask how large an angle is.

    Args:
        scene: the scene.

    Returns:
        One question; none about a rectangle.
    """
    if isinstance(scene, Rectangle):
        return []
    return [Question("angle", "how large is the angle", str(scene.degrees))]


def width(scene: Rectangle | Angle) -> list[Question]:
    """Ask how wide a rectangle is.

    Args:
        scene: the scene.

    Returns:
        One question; none about an angle.
    """
    return _of_sides(scene, "width", lambda wide, _: wide)


def height(scene: Rectangle | Angle) -> list[Question]:
    """Ask how high a rectangle is.

    Args:
        scene: the scene.

    Returns:
        One question; none about an angle.
    """
    return _of_sides(scene, "height", lambda _, high: high)


def area(scene: Rectangle | Angle) -> list[Question]:
    """Ask for the area of a rectangle.

    Args:
        scene: the scene.

    Returns:
        One question; none about an angle.
    """
    return _of_sides(scene, "area", lambda wide, high: wide * high)


def perimeter(scene: Rectangle | Angle) -> list[Question]:
    """Ask for the perimeter of a rectangle.

    Args:
        scene: the scene.

    Returns:
        One question; none about an angle.
    """
    return _of_sides(scene, "perimeter", lambda wide, high: 2 * (wide + high))


def _of_sides(
    scene: Rectangle | Angle, kind: str, value: Callable[[int, int], int]
) -> list[Question]:
    if isinstance(scene, Angle):
        return []
    return [Question(kind, f"what is the {kind}", str(value(scene.width, scene.height)))]


TASK = Task(
    "geometry",
    "sides, area and perimeter of rectangles, and angles",
    {"angle": angle, "width": width, "height": height, "area": area, "perimeter": perimeter},
    random_scene,
)
"""The task."""
