"""VQA: colours, shapes, numbers and places of objects in a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from omnimerge.bench.capabilities.tasks.objects import Item, Objects, random_objects
from omnimerge.bench.capabilities.tasks.task import COLOURS, Question, Task


def random_scene(rng: np.random.Generator) -> Objects:
    """Draw two to four objects.

    Args:
        rng: source of every choice.

    Returns:
        The scene.
    """
    return random_objects(rng, fewest=2, most=4, sizes=(2,), apart=2)


def colour(scene: Objects) -> list[Question]:
    """Ask for the colour of a shape that is there once.

    Args:
        scene: the scene.

    Returns:
        The questions.
    """
    often = Counter(item.shape for item in scene.items)
    return [
        Question("colour", f"what colour is the {item.shape}", item.colour)
        for item in scene.items
        if often[item.shape] == 1
    ]


def shape(scene: Objects) -> list[Question]:
    """Ask for the shape of a colour that is there once.

    Args:
        scene: the scene.

    Returns:
        The questions.
    """
    often = Counter(item.colour for item in scene.items)
    return [
        Question("shape", f"what shape is {item.colour}", item.shape)
        for item in scene.items
        if often[item.colour] == 1
    ]


def count(scene: Objects) -> list[Question]:
    """Ask how many objects there are.

    Args:
        scene: the scene.

    Returns:
        One question.
    """
    return [Question("count", "how many objects", str(len(scene.items)))]


def same(scene: Objects) -> list[Question]:
    """Ask how many objects have a colour, also one that is not there.

    Args:
        scene: the scene.

    Returns:
        A question per colour that is there, and one for a colour that is not.
    """
    often = Counter(item.colour for item in scene.items)
    absent = next(name for name in COLOURS if name not in often)
    return [
        Question("same", f"how many {name} objects", str(often[name])) for name in (*often, absent)
    ]


def leftmost(scene: Objects) -> list[Question]:
    """Ask for the colour of what is farthest to the left.

    Args:
        scene: the scene.

    Returns:
        One question, or none if two begin at the same place.
    """
    found = _first(scene, lambda item: item.left)
    return [Question("leftmost", "what colour is leftmost", item.colour) for item in found]


def topmost(scene: Objects) -> list[Question]:
    """Ask for the shape of what is farthest to the top.

    Args:
        scene: the scene.

    Returns:
        One question, or none if two begin at the same place.
    """
    found = _first(scene, lambda item: item.top)
    return [Question("topmost", "what shape is topmost", item.shape) for item in found]


def _first(scene: Objects, place: Callable[[Item], Any]) -> list[Item]:
    least = min(map(place, scene.items))
    found = [item for item in scene.items if place(item) == least]
    return found if len(found) == 1 else []


TASK = Task(
    "vqa",
    "colours, shapes, numbers and places of objects",
    {
        "colour": colour,
        "shape": shape,
        "count": count,
        "same": same,
        "leftmost": leftmost,
        "topmost": topmost,
    },
    random_scene,
)
"""The task."""
