"""The whole search on a real, tiny pair: in memory it equals checkpoints on disk."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from omnimerge.engine import build_plan, load_recipe, run_plan
from omnimerge.errors import PromptError, RecipeError, SearchError
from omnimerge.generate import Generator, read_prompts
from omnimerge.search import executor, read_result, search
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
    assert result.tie_set == tuple(p.values for p in result.points[1:3] if p.score == best)
    assert result.selected == result.tie_set[0]
    assert all(p.accuracy == 0.0 for p in result.points)
    assert result.prompts.count == 8 and result.heldout.count == 12
    assert result.recipe["method"] == "adamms" and "torch" in result.versions
    assert [done for _, done, _ in seen] == list(range(1, 89))
    assert seen[79] == ("0.6", 80, 80)
    assert seen[-1] == (f"{result.alpha:g}", 88, 88)  # the chosen point, a second time
    found = result.diagnostics
    assert (found.noise.prompts, found.noise.differing) == (8, 0)  # deterministic on a CPU
    assert found.points[0].like_target == 1.0  # alpha 0 is the target
    assert all(p.like_donor is not None for p in found.points)
    assert found.bootstrap.samples == 1000
    assert result.cost["samples_answered"] == 88
    chosen = load_recipe(out / "recipe.yaml")
    assert chosen.parameters == {"alpha": result.alpha}
    assert json.loads((out / "mapping.json").read_text())["mergeable"] is True
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
        def responses_iter(self, prompts, **options):
            asked.extend(prompts)
            return super().responses_iter(prompts, **options)

    monkeypatch.setattr(executor, "Generator", Watching)
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
    monkeypatch.setattr(executor, "Generator", NoGenerator)
    again = search(recipe, prompts, out, **OPTIONS)
    same = {"elapsed_s": 0, "cost": {}}
    assert again.model_copy(update=same) == first.model_copy(update=same)
    other = {**OPTIONS, "criterion": "backward", "checks": False}
    assert search(recipe, prompts, out, **other).criterion == "backward"
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
    monkeypatch.setattr(executor, "Generator", NoGenerator)

    def attempt(source=recipe, file=prompts, **options):
        search(source, file, tmp_path / "out", **{**OPTIONS, **options})

    linear = {"method": "linear", "models": recipe["models"] * 2}
    with pytest.raises(SearchError, match="at least three values"):
        attempt(grid="0,0.5")
    with pytest.raises(SearchError, match="unknown distance"):
        attempt(distance="exactly")
    with pytest.raises(SearchError, match="shares are of several donors"):
        attempt(shares="0:0.6:0.2")
    with pytest.raises(SearchError, match="refine works on one axis"):
        attempt(grid=["0:0.6:0.2", "alpha@layers:0=0:0.6:0.2"], refine=1)
    with pytest.raises(SearchError, match="unknown executor 'cluster'"):
        attempt(executor="cluster")
    with pytest.raises(RecipeError, match="fits no tensor"):
        attempt(grid="alpha@layers:7-9=0:0.6:0.2")
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


def test_refinement_halves_the_step_around_the_best(recipe, prompts, tmp_path):
    out = tmp_path / "out"
    coarse = search(recipe, prompts, out, **OPTIONS)
    fine = search(recipe, prompts, out, refine=1, **OPTIONS)
    assert len(fine.points) == 6 and fine.per_step
    added = {p.alpha for p in fine.points} - {p.alpha for p in coarse.points}
    assert added == {round(coarse.alpha - 0.1, 12), round(coarse.alpha + 0.1, 12)}
    answers = texts(fine, out)
    # Divided by the step: by hand, for every interior point.
    points = [p.alpha for p in fine.points]
    smallest = min(b - a for a, b in itertools.pairwise(points))
    for i in range(1, 5):
        expected = sum(
            max(
                (here.lower() != before.lower()) * smallest / (points[i] - points[i - 1]),
                (here.lower() != after.lower()) * smallest / (points[i + 1] - points[i]),
            )
            for before, here, after in zip(*answers[i - 1 : i + 2], strict=True)
        )
        assert fine.points[i].score == pytest.approx(expected)


def test_two_axes_of_which_one_is_a_layer_range(recipe, prompts, tmp_path):
    axes = ["alpha=0:0.4:0.2", "alpha@layers:1=0:0.4:0.2"]
    options = {**OPTIONS, "grid": axes, "sample": 4}
    result = search(recipe, prompts, tmp_path / "out", **options)
    assert len(result.points) == 9
    assert [p.values for p in result.points if p.score is not None] == [
        {"alpha": 0.2, "alpha@layers:1": 0.2}
    ]
    assert result.selected == {"alpha": 0.2, "alpha@layers:1": 0.2}
    chosen = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert chosen.overrides[0].match.layers == "1"
    assert chosen.overrides[0].parameters == {"alpha": 0.2}
    # The written recipe merges to what was asked: its answers are those of that point.
    run_plan(build_plan(chosen), tmp_path / "merged")
    asked = read_prompts(prompts)
    expected = Generator.load(tmp_path / "merged").responses(asked, max_new_tokens=4)
    by_id = {r.id: r.text for r in expected}
    (file,) = [p.responses for p in result.points if p.values == result.selected]
    for line in (tmp_path / "out" / file).read_text().splitlines():
        row = json.loads(line)
        assert row["response"] == by_id[row["id"]]


def test_shares_of_two_donors(pair, prompts, tmp_path):
    target, donor = pair
    recipe = {"method": "adamms", "target": str(target), "models": [str(donor), str(target)]}
    result = search(recipe, prompts, tmp_path / "out", shares="0:0.6:0.2", **{
        **OPTIONS, "sample": 4, "checks": False})  # fmt: skip
    assert len(result.points) == 10 and result.selected == {"alpha.1": 0.2, "alpha.2": 0.2}
    chosen = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert chosen.parameters == {"alpha": 0.4, "weights": [0.2, 0.2]}


def test_trials_try_some_points_and_go_on_where_they_were(recipe, prompts, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    options = {**OPTIONS, "grid": "0:0.6:0.05", "sample": 4, "trials": 3, "checks": False}
    first = search(recipe, prompts, tmp_path / "out", **options)
    assert 3 <= len(first.points) < 13
    assert {p.score is None for p in first.points} == {True, False}
    monkeypatch.setattr(executor, "Generator", NoGenerator)
    again = search(recipe, prompts, tmp_path / "out", **options)
    assert again.points == first.points and again.selected == first.selected


def test_tokens_follow_one_answer_at_every_point(recipe, prompts, tmp_path):
    result = search(recipe, prompts, tmp_path / "out", distance="tokens", **OPTIONS)
    rows = [
        [json.loads(x)["tokens"] for x in (tmp_path / "out" / p.responses).read_text().splitlines()]
        for p in result.points
    ]
    assert all(len(a) == len(b) for a, b in zip(rows[0], rows[3], strict=True))
    reference = (tmp_path / "out" / "checks" / "reference.jsonl").read_text().splitlines()
    given = [json.loads(line)["tokens"] for line in reference]
    # At the first point the model's own next tokens are the answer that it follows.
    assert all(own[: len(own) - 1] == answer for own, answer in zip(rows[0], given, strict=True))
    assert result.points[1].score is not None


def test_the_donor_that_cannot_answer_is_a_note(recipe, prompts, tmp_path):
    silent = shutil.copytree(recipe["models"][0], tmp_path / "silent")
    for name in ("chat_template.jinja", "processor_config.json", "preprocessor_config.json"):
        (silent / name).unlink(missing_ok=True)
    result = search({**recipe, "models": [str(silent)]}, prompts, tmp_path / "out", **OPTIONS)
    (note,) = result.diagnostics.notes
    assert note.startswith("the donor alone was not asked")
    assert all(p.like_donor is None for p in result.diagnostics.points)


def test_the_target_alone_is_asked_with_its_own_weights(recipe, prompts, tmp_path):
    """A grid without alpha 0: the target is loaded again, after other weights were in the model."""
    options = {**OPTIONS, "grid": "0.2:0.6:0.2"}
    result = search(recipe, prompts, tmp_path / "out", **options)
    lines = (tmp_path / "out" / "checks" / "target.jsonl").read_text().splitlines()
    asked = [p for p in read_prompts(prompts) if p.id in {json.loads(x)["id"] for x in lines}]
    expected = Generator.load(Path(recipe["target"])).responses(asked, max_new_tokens=4)
    assert [json.loads(line)["response"] for line in lines] == [r.text for r in expected]
    assert result.diagnostics.points[0].like_target is not None


def test_prompts_of_a_table_with_pictures_inside(recipe, prompts, tmp_path):
    """A VLMEvalKit TSV: the pictures are unpacked into the search's folder, once."""
    import base64

    picture = base64.b64encode((prompts.parent / "a.png").read_bytes()).decode()
    rows = ["index\tquestion\tanswer\timage"]
    rows += [f"{i}\twhat {'is ' * i}\tx\t{picture}" for i in range(5)]
    table = tmp_path / "bench.tsv"
    table.write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    result = search(recipe, table, out, **OPTIONS)
    assert result.prompts.count == 5
    assert len(list((out / "media").iterdir())) == 1
    again = search(recipe, table, out, **OPTIONS)
    assert again.points == result.points and again.cost == {}


def test_somebody_elses_folder_is_refused_before_anything_is_written(recipe, prompts, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(SearchError, match=r"holds no search \(it has 'thesis.tex'\)"):
        search(recipe, prompts, out, **OPTIONS)
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]
