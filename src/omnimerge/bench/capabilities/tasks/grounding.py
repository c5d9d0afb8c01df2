"""Grounding: the box of the object that a phrase means. An answer is right if IoU >= 0.5."""

from __future__ import annotations

from collections import Counter

import numpy as np

from omnimerge.bench.capabilities.tasks.objects import (
    Box,
    Item,
    Objects,
    box_text,
    overlap,
    random_objects,
)
from omnimerge.bench.capabilities.tasks.task import Question, Task

LEAST_IOU = 0.5
"""As for RefCOCO: P@1."""


def random_scene(rng: np.random.Generator) -> Objects:
    """Draw two objects.

    Args:
        rng: source of every choice.

    Returns:
        The scene.
    """
    return random_objects(rng, fewest=2, most=2, sizes=(2, 3, 4))


def iou(one: Box, other: Box) -> float:
    """Measure how far two boxes agree.

    Args:
        one: a box.
        other: another one.

    Returns:
        Their intersection over their union, in [0, 1].
    """
    shared = overlap(one, other)
    union = _area(one) + _area(other) - shared
    return shared / union if union else 0.0


def read_box(text: str) -> Box | None:
    """Read a box from an answer.

    Args:
        text: four digits, spaces between them or not.

    Returns:
        The box; None if there is none, or nothing is in it.
    """
    digits = text.replace(" ", "")
    if len(digits) != 4 or not (digits.isascii() and digits.isdigit()):
        return None
    left, top, right, bottom = map(int, digits)
    return (left, top, right, bottom) if left < right and top < bottom else None


def right(answer: str, given: str) -> bool:
    """Mark a box.

    Args:
        answer: the right box.
        given: the model's answer.

    Returns:
        Whether it is a box whose IoU with the right one is at least `LEAST_IOU`.
    """
    wanted, found = read_box(answer), read_box(given)
    return wanted is not None and found is not None and iou(wanted, found) >= LEAST_IOU


def named(scene: Objects) -> list[Question]:
    """Ask for an object by its colour and shape.

    Args:
        scene: the scene.

    Returns:
        A question per object.
    """
    return [_ask("named", f"the {item.name}", item) for item in scene.items]


def coloured(scene: Objects) -> list[Question]:
    """Ask for an object by its colour alone.

    Args:
        scene: the scene.

    Returns:
        A question per colour that is there once.
    """
    often = Counter(item.colour for item in scene.items)
    return [
        _ask("coloured", f"the {item.colour} object", item)
        for item in scene.items
        if often[item.colour] == 1
    ]


def leftmost(scene: Objects) -> list[Question]:
    """Ask for the object that is farthest to the left.

    Args:
        scene: the scene.

    Returns:
        One question, or none if two begin at the same place.
    """
    lefts = [item.left for item in scene.items]
    found = [item for item in scene.items if item.left == min(lefts)]
    return [_ask("leftmost", "the leftmost object", found[0])] if len(found) == 1 else []


def largest(scene: Objects) -> list[Question]:
    """Ask for the largest object.

    Args:
        scene: the scene.

    Returns:
        One question, or none if two are as large.
    """
    sizes = [item.size for item in scene.items]
    found = [item for item in scene.items if item.size == max(sizes)]
    return [_ask("largest", "the largest object", found[0])] if len(found) == 1 else []


def _ask(kind: str, phrase: str, item: Item) -> Question:
    return Question(kind, f"box of {phrase}", box_text(item.box))


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


TASK = Task(
    "grounding",
    "boxes of objects, by phrases; IoU >= 0.5",
    {"named": named, "coloured": coloured, "leftmost": leftmost, "largest": largest},
    random_scene,
    right,
)
"""The task."""
