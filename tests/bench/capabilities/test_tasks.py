"""The five tasks: answers of scenes built by hand, marking, and disjoint splits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from omnimerge.bench.capabilities import exam, models
from omnimerge.bench.capabilities.presets import PRESETS
from omnimerge.bench.capabilities.tasks import (
    IMAGE_SIZE,
    TASKS,
    chart,
    draw_scenes,
    geometry,
    grounding,
    kinds_of,
    objects,
    ocr,
    vqa,
)
from omnimerge.bench.capabilities.tasks.task import COLOURS, part_of

THREE = objects.Objects(
    (
        objects.Item("red", "circle", 4, 0, 2),
        objects.Item("red", "square", 2, 2, 2),
        objects.Item("blue", "triangle", 0, 6, 2),
    )
)
BARS = chart.Chart((("red", 3), ("blue", 5), ("green", 1), ("black", 5)))
SIGN = ocr.Text("HAT", "407", 0, 2, "black")
SIDES = geometry.Rectangle(0, 1, 3, 5)


def answers(name, kind, scene):
    return {asked.text: asked.answer for asked in TASKS[name].questions(scene, kind)}


def test_vqa():
    assert answers("vqa", "colour", THREE)["what colour is the triangle"] == "blue"
    assert answers("vqa", "shape", THREE) == {"what shape is blue": "triangle"}  # two are red
    assert answers("vqa", "count", THREE) == {"how many objects": "3"}
    assert answers("vqa", "leftmost", THREE) == {"what colour is leftmost": "blue"}
    assert answers("vqa", "topmost", THREE) == {"what shape is topmost": "circle"}
    assert answers("vqa", "same", THREE) == {
        "how many red objects": "2",
        "how many blue objects": "1",
        "how many green objects": "0",
    }


def test_two_at_the_left_edge_are_not_asked_about():
    both = objects.Objects(
        (objects.Item("red", "circle", 0, 0, 2), objects.Item("blue", "circle", 0, 4, 2))
    )

    assert vqa.leftmost(both) == grounding.leftmost(both) == []
    assert vqa.colour(both) == []  # two circles


def test_geometry():
    assert answers("geometry", "width", SIDES) == {"what is the width": "3"}
    assert answers("geometry", "height", SIDES) == {"what is the height": "5"}
    assert answers("geometry", "area", SIDES) == {"what is the area": "15"}
    assert answers("geometry", "perimeter", SIDES) == {"what is the perimeter": "16"}
    assert answers("geometry", "angle", SIDES) == {}
    assert answers("geometry", "angle", geometry.Angle(120, 7)) == {"how large is the angle": "120"}
    assert answers("geometry", "area", geometry.Angle(120, 7)) == {}


def test_chart():
    assert answers("chart", "value", BARS)["value of blue"] == "5"
    assert answers("chart", "highest", BARS) == {}  # two are as high
    assert answers("chart", "lowest", BARS) == {"what is lowest": "green"}
    assert answers("chart", "difference", BARS) == {
        "red minus green": "2",
        "blue minus red": "2",
        "blue minus green": "4",
        "black minus red": "2",
        "black minus green": "4",
    }


def test_ocr():
    assert answers("ocr", "word", SIGN) == {"read the word": "HAT"}
    assert answers("ocr", "number", SIGN) == {"read the number": "407"}
    assert answers("ocr", "first", SIGN) == {"first letter of the word": "H"}
    assert answers("ocr", "last", SIGN) == {"last letter of the word": "T"}


def test_grounding():
    assert answers("grounding", "named", THREE)["box of the red square"] == "2244"
    assert answers("grounding", "coloured", THREE) == {"box of the blue object": "0628"}
    assert answers("grounding", "leftmost", THREE) == {"box of the leftmost object": "0628"}
    assert answers("grounding", "largest", THREE) == {}  # all are as large


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 3, 3), (1, 0, 4, 3), 6 / 12),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 4, 4), (1, 1, 3, 3), 4 / 16),
        ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),
    ],
)
def test_iou(one, other, expected):
    assert grounding.iou(one, other) == pytest.approx(expected)
    assert grounding.iou(other, one) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "right"),
    [("0033", True), ("1043", True), ("0 0 3 3", True), ("2053", False), ("3300", False)],
)
def test_a_box_is_right_from_half(given, right):
    assert TASKS["grounding"].right("0033", given) is right


@pytest.mark.parametrize("given", ["", "003", "00331", "red", "²²33", "0000"])
def test_what_is_no_box_is_wrong(given):
    assert not grounding.right("0033", given)


def test_the_others_are_marked_by_exact_match():
    assert TASKS["ocr"].right("HAT", "HAT")
    assert not TASKS["ocr"].right("HAT", "hat")


@pytest.mark.parametrize(
    ("scene", "at", "colour"),
    [
        (THREE, (30, 6), "red"),  # the middle of the circle
        (THREE, (18, 18), "red"),
        (THREE, (1, 1), None),
        (BARS, (6, 47), "red"),
        (BARS, (6, 29), None),  # above a bar of height 3
        (BARS, (6, 31), "red"),
        (SIGN, (1, 1), "black"),  # the left top dot of the H
        (SIGN, (3, 1), None),
        (SIDES, (0, 6), "black"),
        (SIDES, (17, 35), "black"),
        (SIDES, (9, 20), None),
        (geometry.Angle(90, 0), (40, 24), "black"),
        (geometry.Angle(90, 0), (24, 8), "black"),  # counter-clockwise is up
        (geometry.Angle(90, 0), (24, 40), None),
    ],
)
def test_pictures(scene, at, colour):
    image = scene.draw()

    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert image.getpixel(at) == (COLOURS[colour] if colour else (245, 245, 245))


def test_scenes_in_words():
    assert THREE.tell() == "red circle 4062, red square 2244, blue triangle 0628"
    assert BARS.tell() == "red 3, blue 5, green 1, black 5"
    assert SIGN.tell() == "word HAT number 407"
    assert SIDES.tell() == "rectangle 3 by 5"
    assert geometry.Angle(120, 7).tell() == "angle 120"


def test_every_glyph_has_five_rows_of_five():
    assert len(ocr.FONT) == 22
    assert len(set(ocr.FONT.values())) == 22
    assert {len(row) for rows in ocr.FONT.values() for row in rows} == {5}
    assert {len(rows) for rows in ocr.FONT.values()} == {5}


def test_no_picture_is_in_two_parts():
    """Not even where scenes that differ are drawn alike, or a task has another's pictures."""
    parts = {
        part: {
            scene.draw().tobytes()
            for task in TASKS.values()
            for seed in range(2)
            for scene in draw_scenes(task, part, 200, seed=seed)
        }
        for part in ("train", "val", "test")
    }

    assert not parts["train"] & parts["val"]
    assert not parts["train"] & parts["test"]
    assert not parts["val"] & parts["test"]


def test_the_same_objects_in_another_order_are_the_same_picture():
    scene = objects.random_objects(np.random.default_rng(0), fewest=3, most=3, sizes=(2, 3))
    turned = replace(scene, items=scene.items[::-1])
    assert repr(turned) != repr(scene) and part_of(turned) == part_of(scene)


@pytest.mark.parametrize("name", TASKS)
def test_same_seed_same_scenes(name):
    drawn = [draw_scenes(TASKS[name], "train", 20, seed=seed) for seed in (1, 1, 2)]

    assert drawn[0] == drawn[1] != drawn[2]
    assert {part_of(scene) for scene in drawn[0]} == {"train"}


def test_objects_do_not_overlap():
    for seed in range(50):
        scene = objects.random_objects(np.random.default_rng(seed), fewest=3, most=4, sizes=(2, 3))
        pairs = [(a, b) for a in scene.items for b in scene.items if a is not b]

        assert all(objects.overlap(a.box, b.box) == 0 for a, b in pairs)
        assert all(a.name != b.name for a, b in pairs)
        assert all(0 <= edge <= 8 for item in scene.items for edge in item.box)


def test_an_exam_asks_as_many_of_each_kind():
    drawn = exam.sheet("chart", list(TASKS["chart"].kinds), "test", 40, seed=0)

    kinds = [question.kind for _, question in drawn]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(TASKS["chart"].kinds, 10)
    assert len({scene.draw().tobytes() for scene, _ in drawn}) == 40
    assert {part_of(scene) for scene, _ in drawn} == {"test"}


def test_prompt_files_are_the_same_for_the_same_seed(tmp_path):
    for folder in ("one", "two"):
        exam.write(tmp_path / folder, "val", 6, kinds=kinds_of(TASKS), seed=3)

    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 24  # 6 + 5 + 4 + 4 + 4 pictures, as many of each kind, and the questions
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_marks_by_hand(tmp_path):
    from omnimerge.generate import Response

    exam.write(tmp_path, "val", 6, kinds=kinds_of(TASKS), seed=0)
    prompts = exam.read(tmp_path, "val")
    given = [Response(p.id, p.answer if p.kind.startswith("ocr") else "?") for p in prompts]

    assert exam.mark(prompts, given) == {
        "vqa": 0.0,
        "geometry": 0.0,
        "chart": 0.0,
        "ocr": 1.0,
        "grounding": 0.0,
    }


def test_every_answer_fits_into_the_tokens_that_are_decoded():
    tokenizer = models.tokenizer(models.QWEN2VL)
    for name, task in TASKS.items():
        for scene in draw_scenes(task, "val", 30, seed=0):
            for kind in task.kinds:
                for asked in task.questions(scene, kind):
                    assert len(tokenizer.tokenize(asked.answer)) < exam.MAX_NEW_TOKENS, (
                        name,
                        asked,
                    )


@pytest.mark.parametrize("name", models.NAMES)
def test_every_word_is_one_token(name):
    from omnimerge.bench.capabilities import words

    tokenizer = models.tokenizer(name)

    assert all(len(tokenizer.tokenize(word)) == 1 for word in words.WORDS)
    assert all(len(tokenizer.tokenize(f" {word}")) == 1 for word in words.WORDS)
    assert all(len(tokenizer.tokenize(token)) == 1 for token in words.SPECIAL_TOKENS)
    assert len(tokenizer) <= models.VOCABULARY_SIZE


@pytest.mark.parametrize(("line", "preset"), [(n, p) for n in PRESETS for p in PRESETS[n]])
def test_presets_ask_known_kinds_of_every_task(line, preset):
    sizes = PRESETS[line][preset]

    assert set(sizes.kinds) <= set(kinds_of(TASKS))
    for task in TASKS:
        shares = sizes.kinds_of(task)
        assert sum(shares.values()) == pytest.approx(1.0)
        assert max(shares.values()) == pytest.approx(10 * min(shares.values()))


def test_the_full_preset_asks_every_kind():
    assert set(PRESETS["internvl"]["full"].kinds) == set(kinds_of(TASKS))
