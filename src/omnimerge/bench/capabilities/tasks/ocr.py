"""OCR: a word and a number, drawn with a small bitmap font."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from omnimerge.bench.capabilities.tasks.task import (
    BACKGROUND,
    COLOURS,
    IMAGE_SIZE,
    Question,
    Task,
)

_GLYPHS = """
A .###. #...# ##### #...# #...#
C .#### #.... #.... #.... .####
E ##### #.... ####. #.... #####
F ##### #.... ####. #.... #....
H #...# #...# ##### #...# #...#
K #...# #..#. ###.. #..#. #...#
L #.... #.... #.... #.... #####
N #...# ##..# #.#.# #..## #...#
P ####. #...# ####. #.... #....
T ##### ..#.. ..#.. ..#.. ..#..
U #...# #...# #...# #...# .###.
X #...# .#.#. ..#.. .#.#. #...#
0 .###. #..## #.#.# ##..# .###.
1 ..#.. .##.. ..#.. ..#.. .###.
2 ####. ....# .###. #.... #####
3 ####. ....# .###. ....# ####.
4 #..#. #..#. ##### ...#. ...#.
5 ##### #.... ####. ....# ####.
6 .###. #.... ####. #...# .###.
7 ##### ....# ...#. ..#.. ..#..
8 .###. #...# .###. #...# .###.
9 .###. #...# .#### ....# .###.
"""

FONT = {line[0]: tuple(line[2:].split()) for line in _GLYPHS.strip().splitlines()}
"""Character -> five rows of five pixels."""

LETTERS = "".join(glyph for glyph in FONT if glyph.isalpha())
DIGITS = "".join(glyph for glyph in FONT if glyph.isdigit())

_PLACES = 4  # characters across, and lines
_STEP = IMAGE_SIZE // _PLACES
_DOT = 2  # pixels


@dataclass(frozen=True)
class Text:
    """A word and, on a line further down, a number; lines count from 0, and begin at the left."""

    word: str
    number: str
    word_line: int
    number_line: int
    ink: str

    def tell(self) -> str:
        """Spell both.

        Returns:
            Such as ``word HAT number 407``.
        """
        return f"word {self.word} number {self.number}"

    def draw(self) -> Image.Image:
        """Draw both.

        Returns:
            The picture.
        """
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
        pen = ImageDraw.Draw(image)
        for text, line in ((self.word, self.word_line), (self.number, self.number_line)):
            for place, glyph in enumerate(text):
                _draw_glyph(pen, glyph, line, place, COLOURS[self.ink])
        return image


def random_scene(rng: np.random.Generator) -> Text:
    """Draw a word of two to four letters and a number of two or three digits.

    Args:
        rng: source of every choice.

    Returns:
        The scene.
    """
    word = "".join(rng.choice(list(LETTERS), size=int(rng.integers(2, 5))))
    number = "".join(rng.choice(list(DIGITS), size=int(rng.integers(2, 4))))
    word_line = int(rng.integers(0, 2))
    ink = str(rng.choice([name for name in COLOURS if name != "yellow"]))
    return Text(word, number, word_line, int(rng.integers(2, _PLACES)), ink)


def word(scene: Text) -> list[Question]:
    """Ask for the word.

    Args:
        scene: the scene.

    Returns:
        One question.
    """
    return [Question("word", "read the word", scene.word)]


def number(scene: Text) -> list[Question]:
    """Ask for the number.

    Args:
        scene: the scene.

    Returns:
        One question.
    """
    return [Question("number", "read the number", scene.number)]


def first(scene: Text) -> list[Question]:
    """Ask for the first letter of the word.

    Args:
        scene: the scene.

    Returns:
        One question.
    """
    return [Question("first", "first letter of the word", scene.word[0])]


def last(scene: Text) -> list[Question]:
    """Ask for the last letter of the word.

    Args:
        scene: the scene.

    Returns:
        One question.
    """
    return [Question("last", "last letter of the word", scene.word[-1])]


def _draw_glyph(
    pen: ImageDraw.ImageDraw, glyph: str, line: int, place: int, ink: tuple[int, int, int]
) -> None:
    left, top = place * _STEP + 1, line * _STEP + 1
    for row, dots in enumerate(FONT[glyph]):
        for column, dot in enumerate(dots):
            if dot == "#":
                x, y = left + _DOT * column, top + _DOT * row
                pen.rectangle((x, y, x + _DOT - 1, y + _DOT - 1), fill=ink)


TASK = Task(
    "ocr",
    "words and numbers in a bitmap font",
    {"word": word, "number": number, "first": first, "last": last},
    random_scene,
)
"""The task."""
