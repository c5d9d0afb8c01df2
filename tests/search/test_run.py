"""The whole search on a real, tiny pair: in memory it equals checkpoints on disk."""

import json
import shutil

import pytest

from omnimerge.engine import build_plan, load_recipe, run_plan
from omnimerge.errors import PromptError, RecipeError, SearchError
from omnimerge.generate import Generator, read_prompts
from omnimerge.search import read_result, run, search
from omnimerge.search.criteria import unanimity


@pytest.fixture
def recipe(pair):
    target, donor = pair
    return {"method": "adamms", "target": str(target), "models": [str(donor)]}


OPTIONS = {"grid": "0:0.6:0.2", "sample": 8, "max_new_tokens": 4, "batch_size": 4}


def texts(result, folder):
    return [
        [json.loads(x)["response"] for x in (folder / p.responses).read_text().splitlines()]
        for p in result.points
    ]


def test_search_end_to_end(recipe, prompts, tmp_path, capfd):
    out, seen = tmp_path / "out", []
    result = search(
        recipe, prompts, out, heldout=prompts, on_progress=lambda *e: seen.append(e), **OPTIONS
    )

    assert [p.alpha for p in result.points] == [0.0, 0.2, 0.4, 0.6]
    answers = texts(result, out)
    assert [len(at_point) for at_point in answers] == [8] * 4
    assert answers[0] != answers[3]
    assert [p.score for p in result.points] == unanimity(answers)
    best = min(p.score for p in result.points[1:3])
    assert result.tie_set == tuple(p.alpha for p in result.points[1:3] if p.score == best)
    assert result.selected == result.tie_set[0]
    assert all(p.accuracy == 0.0 for p in result.points)
    assert result.prompts.count == 8 and result.heldout.count == 12
    assert result.recipe["method"] == "adamms" and "torch" in result.versions
    assert seen[-1] == (0.6, 80, 80)
    assert read_result(out) == result
    assert capfd.readouterr() == ("", "")


def test_in_memory_answers_equal_those_of_the_written_checkpoint(recipe, prompts, tmp_path):
    result = search(recipe, prompts, tmp_path / "out", **{**OPTIONS, "sample": None})
    written = tmp_path / "merged"
    run_plan(build_plan(load_recipe({**recipe, "parameters": {"alpha": 0.4}})), written)
    expected = Generator.load(written).responses(read_prompts(prompts), max_new_tokens=4)
    assert texts(result, tmp_path / "out")[2] == [r.text for r in expected]


def test_labels_do_not_reach_the_model_and_do_not_change_the_choice(
    recipe, prompts, tmp_path, monkeypatch
):
    asked = []

    class Watching(Generator):
        def responses(self, prompts, **options):
            asked.extend(prompts)
            return super().responses(prompts, **options)

    monkeypatch.setattr(run, "Generator", Watching)
    with_labels = search(recipe, prompts, tmp_path / "a", heldout=prompts, **OPTIONS)
    assert asked
    assert all(prompt.answer is None for prompt in asked)

    bare = tmp_path / "bare"
    shutil.copytree(prompts.parent, bare)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    (bare / "prompts.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in r.items() if k != "answer"}) + "\n" for r in rows)
    )
    without = search(recipe, bare / "prompts.jsonl", tmp_path / "b", **OPTIONS)
    assert [p.score for p in without.points] == [p.score for p in with_labels.points]
    assert without.selected == with_labels.selected


class NoGenerator:
    @staticmethod
    def load(*_args, **_options):
        raise AssertionError("nothing is left to be answered")


def test_a_rerun_evaluates_nothing_and_another_criterion_reuses_the_answers(
    recipe, prompts, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    first = search(recipe, prompts, out, **OPTIONS)
    monkeypatch.setattr(run, "Generator", NoGenerator)
    again = search(recipe, prompts, out, **OPTIONS)
    assert again.model_copy(update={"elapsed_s": 0}) == first.model_copy(update={"elapsed_s": 0})
    assert search(recipe, prompts, out, criterion="backward", **OPTIONS).criterion == "backward"
    with pytest.raises(AssertionError):  # a finer grid does need the model
        search(recipe, prompts, out, **{**OPTIONS, "grid": "0:0.6:0.1"})


def test_heldout_prompts_that_come_later_are_answered_then(recipe, prompts, tmp_path):
    out = tmp_path / "out"
    assert search(recipe, prompts, out, **OPTIONS).points[0].accuracy is None
    seen = []
    later = search(
        recipe, prompts, out, heldout=prompts, on_progress=lambda *e: seen.append(e), **OPTIONS
    )
    assert later.points[0].accuracy == 0.0
    assert seen[-1][1:] == (48, 48)  # 4 points, 12 held-out prompts, nothing else


def test_other_weights_in_the_same_place_are_noticed(pair, prompts, tmp_path):
    target, donor = pair
    moved = shutil.copytree(donor, tmp_path / "donor")
    recipe = {"method": "adamms", "target": str(target), "models": [str(moved)]}
    search(recipe, prompts, tmp_path / "out", **OPTIONS)
    file = moved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SearchError, match=r"other settings .*models"):
        search(recipe, prompts, tmp_path / "out", **OPTIONS)
    with pytest.raises(SearchError, match="prompts"):
        search(recipe, prompts, tmp_path / "out", **{**OPTIONS, "seed": 1})


def test_mistakes_are_refused_before_a_model_is_loaded(recipe, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Generator", NoGenerator)

    def attempt(source=recipe, file=prompts, **options):
        search(source, file, tmp_path / "out", **{**OPTIONS, **options})

    linear = {"method": "linear", "models": recipe["models"] * 2}
    with pytest.raises(SearchError, match="at least 3 points"):
        attempt(grid="0,0.5")
    with pytest.raises(SearchError, match="unknown criterion"):
        attempt(criterion="best")
    with pytest.raises((SearchError, RecipeError), match="alpha"):
        attempt(linear)
    with pytest.raises(SearchError, match="no numeric parameter 'alhpa', did you mean 'alpha'"):
        attempt({**recipe, "parameters": {"alpha": 0.1}}, parameter="alhpa")
    with pytest.raises(RecipeError, match=r"alpha: 1\.2 is not in"):
        attempt(grid="0:1.2:0.2")
    with pytest.raises(PromptError, match="no line has an 'answer'"):
        bare = tmp_path / "bare.jsonl"
        bare.write_text('{"id": "1", "prompt": "x"}\n')
        attempt(heldout=bare)
    with pytest.raises(PromptError, match="no such file"):
        attempt(file=tmp_path / "none.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_damaged_result_is_named(tmp_path):
    with pytest.raises(SearchError, match="run the search first"):
        read_result(tmp_path)
    (tmp_path / "search.json").write_text('{"selectd": 1}')
    with pytest.raises(SearchError, match="is no search result"):
        read_result(tmp_path / "search.json")
