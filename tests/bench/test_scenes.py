"""Answers worked by hand on one scene, for every kind of question; prompt files."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from omnimerge.bench.zoo import scenes
from omnimerge.errors import PromptError

#   red circle     .            blue square
#   .              .            .
#   white ring     green cross  .
SCENE = scenes.Scene(
    (
        scenes.Item("green", "cross", "bottom", "center"),
        scenes.Item("red", "circle", "top", "left"),
        scenes.Item("blue", "square", "top", "right"),
        scenes.Item("white", "ring", "bottom", "left"),
    )
)

#   .              .                yellow triangle
#   .              red circle       .
#   white ring     .                .
DIAGONAL = scenes.Scene(
    (
        scenes.Item("red", "circle", "middle", "center"),
        scenes.Item("yellow", "triangle", "top", "right"),
        scenes.Item("white", "ring", "bottom", "left"),
    )
)

BY_HAND = {
    "where": {
        "where is the cross?": "bottom center",
        "where is the circle?": "top left",
        "where is the square?": "top right",
        "where is the ring?": "bottom left",
    },
    "what": {},  # two objects in either row
    "count": {"how many objects are there?": "four"},
    "row": {
        "which row is the cross in?": "bottom",
        "which row is the circle in?": "top",
        "which row is the square in?": "top",
        "which row is the ring in?": "bottom",
    },
    "colour": {
        "what colour is the cross?": "green",
        "what colour is the circle?": "red",
        "what colour is the square?": "blue",
        "what colour is the ring?": "white",
    },
    "shape": {
        "what shape is the green object?": "cross",
        "what shape is the red object?": "circle",
        "what shape is the blue object?": "square",
        "what shape is the white object?": "ring",
    },
    "topmost": {},  # two objects share the top row
    "hue": {
        "which hue has the cross?": "green",
        "which hue has the circle?": "red",
        "which hue has the square?": "blue",
        "which hue has the ring?": "white",
    },
    "height": {
        "how high is the cross?": "bottom",
        "how high is the circle?": "top",
        "how high is the square?": "top",
        "how high is the ring?": "bottom",
    },
    "lowest": {},
    "form": {
        "which form has the green object?": "cross",
        "which form has the red object?": "circle",
        "which form has the blue object?": "square",
        "which form has the white object?": "ring",
    },
    "name": {
        "name the green object.": "green cross",
        "name the red object.": "red circle",
        "name the blue object.": "blue square",
        "name the white object.": "white ring",
    },
    "total": {"how many are on the list?": "four"},
}

ON_THE_DIAGONAL = {
    "what": {
        "what is in the top row?": "yellow triangle",
        "what is in the middle row?": "red circle",
        "what is in the bottom row?": "white ring",
    },
    "count": {"how many objects are there?": "three"},
    "topmost": {"which object is topmost?": "yellow triangle"},
    "lowest": {"which object is lowest?": "white ring"},
    "height": {
        "how high is the circle?": "middle",
        "how high is the triangle?": "top",
        "how high is the ring?": "bottom",
    },
}


def asked(scene, kind):
    return {question.text: question.answer for question in scenes.questions(scene, kind)}


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_answers_worked_by_hand(kind):
    assert asked(SCENE, kind) == BY_HAND[kind]


@pytest.mark.parametrize("kind", ON_THE_DIAGONAL)
def test_answers_on_the_diagonal_worked_by_hand(kind):
    assert asked(DIAGONAL, kind) == ON_THE_DIAGONAL[kind]


def test_exercises_worked_by_hand():
    assert asked(DIAGONAL, "list") == {
        "list the objects.": "circle red middle center, ring white bottom left, "
        "triangle yellow top right."
    }
    assert asked(DIAGONAL, "entry")["list the circle."] == "circle red middle center."
    assert asked(DIAGONAL, "entry")["list the red object."] == "red circle middle center."


def test_every_kind_belongs_to_one_group():
    groups = (*scenes.SHARED_KINDS, *scenes.TARGET_KINDS, *scenes.DONOR_KINDS)

    assert sorted(groups) == sorted(BY_HAND)


def test_unknown_kind_is_named():
    with pytest.raises(
        PromptError, match="unknown kind of question 'colur', did you mean 'colour'"
    ):
        scenes.questions(SCENE, "colur")


def test_scene_in_words():
    assert scenes.tell(SCENE) == (
        "bottom center green cross, top left red circle, "
        "top right blue square, bottom left white ring."
    )


def test_scene_in_pixels():
    image = scenes.draw(SCENE)

    assert image.size == (36, 36)
    assert image.mode == "RGB"
    assert image.getpixel((6, 6)) == scenes.COLOURS["red"]  # the middle of the top left cell
    assert image.getpixel((30, 6)) == scenes.COLOURS["blue"]
    assert image.getpixel((18, 30)) == scenes.COLOURS["green"]
    assert image.getpixel((18, 18)) == (16 + 36, 16, 16 + 36)  # the wall behind an empty cell


def test_no_two_looks_are_drawn_alike():
    drawn = {
        scenes.draw(scenes.Scene((scenes.Item(colour, shape, "middle", "center"),))).tobytes()
        for colour in scenes.COLOURS
        for shape in scenes.SHAPES
    }

    assert len(drawn) == len(scenes.COLOURS) * len(scenes.SHAPES)


def test_scenes_have_three_to_five_different_objects():
    rng = np.random.default_rng(0)

    for scene in (scenes.random_scene(rng) for _ in range(200)):
        assert 3 <= len(scene.items) <= 5
        assert len({item.colour for item in scene.items}) == len(scene.items)
        assert len({item.shape for item in scene.items}) == len(scene.items)
        assert len({item.place for item in scene.items}) == len(scene.items)


def test_prompt_file(tmp_path):
    path = scenes.write_prompts(tmp_path, count=26, seed=3)

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == 2 * list(scenes.KINDS)
    assert all(list(line) == ["id", "prompt", "image", "answer", "kind"] for line in lines)
    assert len({line["id"] for line in lines}) == 26
    with Image.open(tmp_path / lines[0]["image"]) as image:
        assert image.size == (36, 36)


def test_prompt_file_without_labels(tmp_path):
    path = scenes.write_prompts(tmp_path, count=2, seed=3, kinds=["count"], labels=False)

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [list(line) for line in lines] == [["id", "prompt", "image"]] * 2
    assert lines[0]["prompt"] == "how many objects are there?"


def test_same_seed_same_files(tmp_path):
    first, again, other = (
        scenes.write_prompts(tmp_path / name, count=5, seed=seed)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )

    assert first.read_text() == again.read_text() != other.read_text()
    for image in (tmp_path / "first" / "images").iterdir():
        assert image.read_bytes() == (tmp_path / "again" / "images" / image.name).read_bytes()


def test_scenes_need_no_torch():
    code = "import sys, omnimerge.bench.zoo.scenes; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
