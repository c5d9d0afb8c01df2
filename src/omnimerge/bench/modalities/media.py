"""Pictures, sounds and videos of a world: drawn with Pillow, made of gliding tones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from omnimerge.bench.modalities.world import COUNTS, Modality, World

SIDE = 24
FRAMES = 4
RATE = 16_000

_RGB = {
    "red": (220, 40, 40),
    "green": (40, 190, 70),
    "blue": (60, 80, 230),
    "yellow": (230, 210, 50),
}
_STEP = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}


def make(world: World, modality: Modality, rng: np.random.Generator) -> Any:
    """Make one medium of a world; place, size and pitch are drawn.

    Args:
        world: what is to be seen or heard.
        modality: which medium.
        rng: where chance comes from.

    Returns:
        A Pillow image, samples at `RATE`, or a list of `FRAMES` Pillow images.
    """
    if modality == "image":
        return picture(world, rng)
    return sound(world, rng) if modality == "audio" else video(world, rng)


def picture(world: World, rng: np.random.Generator) -> Image.Image:
    """Draw one to three things of a kind.

    Args:
        world: whose image.
        rng: of their places.

    Returns:
        An image of `SIDE` pixels each way.
    """
    image, pen = _canvas(rng)
    colour, shape, count = world.image
    for slot in rng.permutation(9)[: COUNTS.index(count) + 1]:
        x, y = (int(n) * 8 + 3 + int(rng.integers(2)) for n in divmod(int(slot), 3))
        _thing(pen, shape, _RGB[colour], (x, y), 3)
    return image


def video(world: World, rng: np.random.Generator) -> list[Image.Image]:
    """Draw a thing that moves in one direction.

    Args:
        world: whose video.
        rng: of where it starts.

    Returns:
        `FRAMES` images.
    """
    colour, shape, direction = world.video
    dx, dy = _STEP[direction]
    middle = (FRAMES - 1) / 2
    x, y = (12 + int(n) for n in rng.integers(-2, 3, size=2))
    ground = int(rng.integers(0, 40))
    frames = []
    for number in range(FRAMES):
        image = Image.new("RGB", (SIDE, SIDE), (ground, ground, ground))
        shift = round((number - middle) * 4)
        _thing(ImageDraw.Draw(image), shape, _RGB[colour], (x + dx * shift, y + dy * shift), 5)
        frames.append(image)
    return frames


def sound(world: World, rng: np.random.Generator) -> NDArray[np.float32]:
    """Play one to three tones that glide up or down.

    Args:
        world: whose sound.
        rng: of pitch, loudness and noise.

    Returns:
        One second at `RATE`.
    """
    glide, count = world.audio
    samples = rng.standard_normal(RATE) * 0.003
    low = float(rng.uniform(400, 900))
    ends = (low, low * 2.5) if glide == "up" else (low * 2.5, low)
    length, loudness = int(0.18 * RATE), float(rng.uniform(0.2, 0.5))
    starts = sorted(rng.permutation(3)[: COUNTS.index(count) + 1])
    time = np.arange(length) / RATE
    rate = (ends[1] - ends[0]) / (length / RATE)
    tone = np.sin(2 * math.pi * (ends[0] * time + rate * time**2 / 2)) * np.hanning(length)
    for slot in starts:
        begin = int((0.08 + 0.3 * int(slot)) * RATE)
        samples[begin : begin + length] += loudness * tone
    return samples.astype(np.float32)


def _canvas(rng: np.random.Generator) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    ground = int(rng.integers(0, 40))
    image = Image.new("RGB", (SIDE, SIDE), (ground, ground, ground))
    return image, ImageDraw.Draw(image)


def _thing(
    pen: ImageDraw.ImageDraw,
    shape: str,
    colour: tuple[int, int, int],
    centre: tuple[int, int],
    size: int,
) -> None:
    x, y = centre
    if shape == "circle":
        pen.ellipse((x - size, y - size, x + size, y + size), fill=colour)
    elif shape == "square":
        pen.rectangle((x - size + 1, y - size + 1, x + size - 1, y + size - 1), fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y - size), (x - size, y + size), (x + size, y + size)], fill=colour)
    else:
        pen.rectangle((x - size, y - 1, x + size, y + 1), fill=colour)
        pen.rectangle((x - 1, y - size, x + 1, y + size), fill=colour)
