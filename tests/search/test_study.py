"""A study survives being killed, keeps settings apart, and is alone in its folder."""

import json

import pytest

from omnimerge.errors import SearchError
from omnimerge.generate import Prompt, Response
from omnimerge.search import Study, accuracy, run_study
from omnimerge.search.diagnostics import diagnose

POINTS = (0.0, 0.1, 0.2, 0.125 + 0.1)
SETTINGS = {"recipe": {"method": "adamms"}, "max_new_tokens": 8}


class Evaluator:
    """Answers every prompt with the point; stops like a killed process at `dies_at`."""

    def __init__(self, ids=("a", "b"), dies_at=None):
        self.ids, self.dies_at, self.asked = ids, dies_at, []

    def __call__(self, point):
        self.asked.append(point)
        if point == self.dies_at:
            raise KeyboardInterrupt
        return [Response(i, f"{i}\u2028{point}", (1, 2)) for i in self.ids]


def run(folder, evaluate, settings=SETTINGS, points=POINTS, **options):
    return run_study(points, evaluate, folder, settings, ids=evaluate.ids, **options)


def test_points_are_answered_in_order_into_files(tmp_path):
    evaluate, seen = Evaluator(), []
    answers = run(tmp_path / "s", evaluate, on_point=lambda *event: seen.append(event))

    assert evaluate.asked == list(POINTS)
    assert seen == [(point, True) for point in POINTS]
    assert answers[1] == [Response("a", "a\u20280.1", (1, 2)), Response("b", "b\u20280.1", (1, 2))]
    assert sorted(f.name for f in (tmp_path / "s" / "responses").iterdir()) == [
        "alpha_0.00.jsonl", "alpha_0.10.jsonl", "alpha_0.20.jsonl", "alpha_0.225.jsonl",
    ]  # fmt: skip
    first = (tmp_path / "s" / "responses" / "alpha_0.10.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"id": "a", "response": "a\u20280.1", "tokens": [1, 2]}


def test_after_a_kill_only_the_rest_is_evaluated(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Evaluator(dies_at=0.2))
    again, seen = Evaluator(), []
    resumed = run(tmp_path, again, on_point=lambda *event: seen.append(event))

    assert again.asked == [0.2, 0.225]
    assert seen == [(0.0, False), (0.1, False), (0.2, True), (0.225, True)]
    assert resumed == run(tmp_path / "fresh", Evaluator())


def test_a_finer_grid_reuses_the_points_that_are_there(tmp_path):
    run(tmp_path, Evaluator(), points=(0.0, 0.1, 0.2))
    finer = Evaluator()
    run(tmp_path, finer, points=(0.0, 0.05, 0.1, 0.15, 0.2))
    assert finer.asked == [0.05, 0.15]


def test_a_damaged_file_is_evaluated_again(tmp_path):
    run(tmp_path, Evaluator())
    (tmp_path / "responses" / "alpha_0.10.jsonl").write_text('{"id": "a"')
    again = Evaluator()
    run(tmp_path, again)
    assert again.asked == [0.1]


def test_other_settings_are_refused_by_name_unless_overwritten(tmp_path):
    run(tmp_path, Evaluator())
    other = {**SETTINGS, "max_new_tokens": 16}
    with pytest.raises(SearchError, match=r"\(max_new_tokens: 8 there, 16 here\)"):
        run(tmp_path, Evaluator(), other)
    again = Evaluator()
    run(tmp_path, again, other, points=(0.0, 0.1), overwrite=True)
    assert again.asked == [0.0, 0.1]
    assert len(list((tmp_path / "responses").iterdir())) == 2
    run(tmp_path, Evaluator(), other)


def test_a_folder_with_other_files_is_refused_and_never_emptied(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SearchError, match=r"holds no search \(it has 'thesis.tex'\)"):
        run(tmp_path, Evaluator())
    run(tmp_path, Evaluator(), overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_two_searches_into_one_folder(tmp_path):
    with (
        Study(tmp_path, SETTINGS, ["a"]),
        pytest.raises(SearchError, match="another search is writing into it"),
        Study(tmp_path, SETTINGS, ["a"]),
    ):
        pass
    with Study(tmp_path, SETTINGS, ["a"]):  # free again
        pass


def test_answers_must_match_the_prompts(tmp_path):
    with pytest.raises(SearchError, match="do not match the 3 prompts"):
        run_study((0.0,), Evaluator(), tmp_path, SETTINGS, ids=("a", "b", "c"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SearchError, match="choose another output folder"):
        run(tmp_path / "file" / "s", Evaluator())


def test_accuracy_is_case_insensitive_and_joins_on_ids():
    prompts = [Prompt("1", "?", answer="Red"), Prompt("2", "?", answer="3"), Prompt("3", "?")]
    responses = [Response("2", "4"), Response("3", "x"), Response("1", " red ")]
    assert accuracy(prompts, responses) == 0.5
    assert accuracy(prompts[2:], responses) is None
    with pytest.raises(SearchError, match="1 prompts have no response"):
        accuracy(prompts, responses[:2])


def texts(*rows):
    return [[Response(str(i), t, (1,) * len(t)) for i, t in enumerate(row)] for row in rows]


def test_diagnostics_count_what_they_say():
    answers = texts(["a", "bb"], ["A", ""], ["a", "c"])
    found = diagnose((0.0, 0.1, 0.2), answers, (None, 1.0, None))
    # prompt 1 never changes (case aside), prompt 2 does; at 0.1 half of the answers are empty
    assert found.changed_prompts == 1
    assert [p.distinct_rate for p in found.points] == [1.0, 1.0, 1.0]
    assert [p.empty_rate for p in found.points] == [0.0, 0.5, 0.0]
    assert [p.mean_tokens for p in found.points] == [1.5, 0.5, 1.0]
    assert len(found.warnings) == 1
    assert "answers are empty at alpha 0.1:" in found.warnings[0]


@pytest.mark.parametrize(
    ("rows", "scores", "expected"),
    [
        ([["a", "b"]] * 4, (None, 0.0, 0.0, None), ["no answer changes anywhere"]),
        (
            [["a", "b"], ["c", "b"], ["c", "d"], ["e", "d"]],
            (None, 2.0, 2.0, None),
            ["all points tie at 2", "nearly every answer changes"],
        ),
        ([["a", "a"], ["b", "a"], ["b", "c"]], (None, 1.0, None), ["same answer at alpha 0:"]),
        ([["a", "b"], ["c", "b"], ["c", "d"]], (None, 1.0, None), []),
    ],
)
def test_warnings(rows, scores, expected):
    points = tuple(i / 10 for i in range(len(rows)))
    warnings = diagnose(points, texts(*rows), scores).warnings
    assert len(warnings) == len(expected)
    assert all(part in warning for part, warning in zip(expected, warnings, strict=True))
