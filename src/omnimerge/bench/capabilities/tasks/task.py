"""What a task is: scenes that can be drawn or told, questions about them, and how to mark answers.

Whether a scene is for training, validation or test is a function of its pixels alone, so that no
picture of the test was ever seen in training, whatever the seeds and the tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import numpy as np
from PIL import Image

IMAGE_SIZE = 48
"""Width and height of a picture in pixels."""

CELL = 6
"""Pixels of one step of the grid that everything is drawn on."""

STEPS = IMAGE_SIZE // CELL

BACKGROUND = (245, 245, 245)

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 205, 40),
    "black": (30, 30, 30),
}
"""Colour name to RGB."""

DESCRIBE = "describe"
"""The kind of question that no test asks: what is there? Captions teach a model to look."""

Part = Literal["train", "val", "test"]
_SHARES: tuple[tuple[int, Part], ...] = ((10, "val"), (25, "test"), (100, "train"))


@dataclass(frozen=True)
class Question:
    """A question about a scene, its right answer, and the kind of question it is."""

    kind: str
    text: str
    answer: str


class Scene(Protocol):
    """What one picture shows."""

    def tell(self) -> str:
        """Say in words what there is."""

    def draw(self) -> Image.Image:
        """Draw it, `IMAGE_SIZE` pixels wide and high."""


def exact(answer: str, given: str) -> bool:
    """Mark by exact match.

    Args:
        answer: the right answer.
        given: the model's.

    Returns:
        Whether they are the same.
    """
    return answer == given


@dataclass(frozen=True)
class Task:
    """One capability.

    Attributes:
        name: the column of the tables.
        about: one line for people.
        kinds: kind of question -> its questions about a scene; none where the answer would not be
            the only right one.
        random_scene: draws a scene.
        right: marks an answer: (right answer, given answer) -> whether it counts.
    """

    name: str
    about: str
    kinds: dict[str, Callable[..., list[Question]]]
    random_scene: Callable[[np.random.Generator], Scene]
    right: Callable[[str, str], bool] = exact

    def questions(self, scene: Scene, kind: str) -> list[Question]:
        """Ask everything of one kind.

        Args:
            scene: one of this task's.
            kind: a key of `kinds`, or `DESCRIBE`.

        Returns:
            The questions, maybe none.
        """
        if kind == DESCRIBE:
            return [Question(DESCRIBE, "describe", scene.tell())]
        return self.kinds[kind](scene)


def part_of(scene: Scene) -> Part:
    """Tell what a scene is for.

    Args:
        scene: the scene.

    Returns:
        A function of its pixels: about 10 % are for validation and 15 % for the test.
    """
    digest = hashlib.sha256(scene.draw().tobytes()).digest()
    place = int.from_bytes(digest[:4], "big") % 100
    return next(part for limit, part in _SHARES if place < limit)


def scenes_of(task: Task, part: Part, *, seed: int) -> Iterator[Scene]:
    """Draw scenes at random, without end.

    Args:
        task: the task.
        part: what they are for.
        seed: same seed, same scenes.

    Yields:
        A scene.
    """
    rng = np.random.default_rng([seed, *task.name.encode(), *part.encode()])
    while True:
        scene = task.random_scene(rng)
        if part_of(scene) == part:
            yield scene


def draw_scenes(task: Task, part: Part, count: int, *, seed: int) -> list[Scene]:
    """Draw scenes at random.

    Args:
        task: the task.
        part: what they are for.
        count: how many.
        seed: same seed, same scenes.

    Returns:
        The scenes.
    """
    return list(islice(scenes_of(task, part, seed=seed), count))


def kinds_of(tasks: dict[str, Task]) -> list[str]:
    """List the kinds of question of all tasks.

    Args:
        tasks: name -> task.

    Returns:
        ``task.kind`` each.
    """
    return [f"{name}.{kind}" for name, task in tasks.items() for kind in task.kinds]
