"""The whole search on a real, tiny pair: in memory it equals checkpoints on disk."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest

from omnimerge.engine import build_plan, load_recipe, run_plan
from omnimerge.errors import GenerationError, PromptError, RecipeError, SearchError
from omnimerge.generate import Generator, read_prompts
from omnimerge.report import write_search_report
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
    assert result.cost["samples_answered"] == 96  # the donor's too
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
        attempt({**recipe, "parameters": {"alpha": 0}}, grid="alpha@layers:7-9=0:0.6:0.2")
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


def test_axes_without_an_effect_are_refused(recipe, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "Generator", NoGenerator)

    def attempt(source=recipe, **options):
        search(source, prompts, tmp_path / "out", **{**OPTIONS, **options})

    with_alpha = {**recipe, "parameters": {"alpha": 0.1}}
    with pytest.raises(RecipeError, match=r"alpha: required by adamms; alpha@layers:0 is for some"):
        attempt(grid="alpha@layers:0=0:0.6:0.2")
    for axis in ("alpha@name:(", "alpha@layers:x", "alpha@component:brain"):
        with pytest.raises(RecipeError, match=f"search is not valid: {re.escape(axis)}: "):
            attempt(with_alpha, grid=f"{axis}=0:0.6:0.2")
    with pytest.raises(SearchError, match=r"layers:0-1 and alpha@layers:1 are both for some"):
        attempt(with_alpha, grid=["alpha@layers:0-1=0:0.6:0.2", "alpha@layers:1=0:0.6:0.2"])
    with pytest.raises(SearchError, match="axis alpha@component:vision changes no tensor that is"):
        attempt(with_alpha, grid="alpha@component:vision=0:0.6:0.2")
    everywhere = {"overrides": [{"match": {"name": "."}, "parameters": {"alpha": 0.1}}]}
    with pytest.raises(SearchError, match="axis alpha changes no tensor that is merged"):
        attempt({**recipe, **everywhere})
    with pytest.raises(GenerationError, match="device 'cuda:9' cannot be used here"):
        attempt(device="cuda:9")
    with pytest.raises(SearchError, match="no numeric parameter 'beta'"):
        attempt(grid="beta=0:0.6:0.2")
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
    axes = ["alpha=0:0.4:0.2", "alpha@layers:1=0:0.8:0.2"]
    options = {**OPTIONS, "grid": axes, "sample": 4, "checks": False}
    result = search(recipe, prompts, tmp_path / "out", **options)
    assert len(result.points) == 15
    scores = {p.values["alpha@layers:1"]: p.score for p in result.points if p.score is not None}
    assert list(scores) == [0.2, 0.4, 0.6]
    best = min(scores, key=scores.__getitem__)
    assert result.selected == {"alpha": 0.2, "alpha@layers:1": best}
    answers = dict(zip([tuple(p.values.values()) for p in result.points], texts(
        result, tmp_path / "out"), strict=True))  # fmt: skip
    beside = [(0.0, best), (0.4, best), (0.2, round(best - 0.2, 9)), (0.2, round(best + 0.2, 9))]
    around = zip(*(answers[p] for p in beside), strict=True)
    assert scores[best] == sum(
        any(other.lower() != here.lower() for other in others)
        for here, others in zip(answers[0.2, best], around, strict=True)
    )
    chosen = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert chosen.overrides[0].match.layers == "1"
    assert chosen.overrides[0].parameters == {"alpha": best}
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
    result = search(recipe, prompts, tmp_path / "out", shares="0:0.8:0.2", **{
        **OPTIONS, "sample": 4, "checks": False})  # fmt: skip
    scored = {tuple(p.values.values()): p.score for p in result.points if p.score is not None}
    assert len(result.points) == 15 and list(scored) == [(0.2, 0.2), (0.2, 0.4), (0.4, 0.2)]
    first, second = min(scored, key=scored.__getitem__)
    assert result.selected == {"alpha.1": first, "alpha.2": second}
    chosen = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert chosen.parameters == {"alpha": round(first + second, 9), "weights": [first, second]}


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
    reference = (tmp_path / "out" / "checks" / "target.jsonl").read_text().splitlines()
    given = [json.loads(line)["tokens"] for line in reference]
    # At alpha 0 the model's own next tokens are the answer that it follows.
    assert all(own[: len(own) - 1] == answer for own, answer in zip(rows[0], given, strict=True))
    assert result.points[1].score is not None
    found = result.diagnostics
    assert found.warnings == () and found.changed_prompts > 0
    (note,) = found.notes
    assert note.startswith("the points followed the target's own answers and gave none")
    assert not list((tmp_path / "out" / "checks").glob("again*"))  # nothing decoded for nothing
    page = (write_search_report(tmp_path / "out")).read_text()
    assert "followed the target's own answers and gave none, so there are none to compare" in page


def test_tokens_do_not_depend_on_what_the_folder_held_before(recipe, prompts, tmp_path):
    options = {**OPTIONS, "distance": "tokens", "checks": False}
    search(recipe, prompts, tmp_path / "a", **{**options, "grid": "0.2:0.6:0.2"})
    later = search(recipe, prompts, tmp_path / "a", **options)
    fresh = search(recipe, prompts, tmp_path / "b", **options)
    assert [p.score for p in later.points] == [p.score for p in fresh.points]
    assert len(fresh.points) == 4


def test_the_donor_that_cannot_answer_is_a_note(recipe, prompts, tmp_path):
    silent = shutil.copytree(recipe["models"][0], tmp_path / "silent")
    for name in ("chat_template.jinja", "processor_config.json", "preprocessor_config.json"):
        (silent / name).unlink(missing_ok=True)
    result = search({**recipe, "models": [str(silent)]}, prompts, tmp_path / "out", **OPTIONS)
    (note,) = result.diagnostics.notes
    assert note.startswith("the donor alone was not asked")
    assert result.cost["samples_answered"] == 40  # four points, and the chosen one again
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


def test_what_was_answered_elsewhere_can_be_chosen_from_again(recipe, prompts, tmp_path):
    """A finished search of a GPU, on a machine without one."""
    out, options = tmp_path / "out", {**OPTIONS, "checks": False}
    first = search(recipe, prompts, out, **options)
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({**settings, "device": "cuda"}))
    again = search(recipe, prompts, out, **{**options, "device": "cuda:9", "criterion": "pairwise"})
    assert again.criterion == "pairwise" and len(again.points) == len(first.points)
    finer = {**options, "device": "cuda:9", "grid": "0:0.6:0.1"}
    with pytest.raises(GenerationError, match="device 'cuda:9' cannot be used here"):
        search(recipe, prompts, out, **finer)


def test_without_checks_what_is_known_is_said(recipe, prompts, tmp_path):
    options = {**OPTIONS, "checks": False}
    found = search(recipe, prompts, tmp_path / "a", **options).diagnostics
    assert found.points[0].like_target == 1.0 and found.points[3].like_target is not None
    assert found.notes == ("checks were left out: no noise floor, and the donor was not asked",)
    # Where an override has an alpha of its own, alpha 0 is not the target.
    other = {**recipe, "overrides": [{"match": {"layers": "0"}, "parameters": {"alpha": 0.6}}]}
    found = search(other, prompts, tmp_path / "b", **options).diagnostics
    assert found.points[0].like_target is None
    assert found.notes[0] == (
        "overrides.0 of the recipe sets alpha for its tensors; it is not searched there"
    )


def test_drafts_in_16_bits_are_noted(recipe):
    from omnimerge.search.planning import plan_of, space_of
    from omnimerge.search.run import _notes
    from omnimerge.search.scoring import Scoring

    loaded, space = space_of(recipe, "0:0.6:0.2", None, "alpha")
    plan, space = plan_of(loaded, space, ())
    scoring = Scoring.of("unanimity", "exact", None)
    assert _notes(plan, space, scoring, {"drafts_taken": 2, "drafts_in_16_bits": 0}) == []
    (note,) = _notes(plan, space, scoring, {"drafts_taken": 2, "drafts_in_16_bits": 2})
    assert note.startswith("drafts were verified in a 16-bit type")


def test_steps_that_are_not_equal_are_noted(recipe, prompts, tmp_path):
    options = {**OPTIONS, "grid": "0,0.1,0.3,0.6", "checks": False}
    result = search(recipe, prompts, tmp_path / "out", **options)
    assert result.per_step
    assert result.diagnostics.notes[0] == "distances are divided by the step between the points"


def test_the_target_that_is_asked_last_keeps_all_counts(recipe, prompts, tmp_path):
    """The model is loaded again for it; what was done before still counts."""
    result = search(recipe, prompts, tmp_path / "out", **{**OPTIONS, "grid": "0.2:0.6:0.2"})
    # three points, the chosen one again, the target, the donor: of 8 prompts each
    assert result.cost["samples_answered"] == 48


def test_the_donors_code_never_runs_and_one_model_is_held(recipe, prompts, tmp_path, monkeypatch):
    loaded = []

    class Watching(Generator):
        @classmethod
        def load(cls, folder, **options):
            held = sum(isinstance(each, cls) and each.alive for each in loaded)
            loaded.append(super().load(folder, **{**options, "trust_remote_code": False}))
            loaded[-1].told = (Path(folder).name, options.get("trust_remote_code", False), held)
            return loaded[-1]

        @property
        def alive(self):
            return any(self is found for found in (replica._generator for replica in replicas))

    replicas = []
    monkeypatch.setattr(executor, "Generator", Watching)
    plain = executor.LocalExecutor.__init__

    def noting(self, settings):
        plain(self, settings)
        replicas.append(self._replica)

    monkeypatch.setattr(executor.LocalExecutor, "__init__", noting)
    search(recipe, prompts, tmp_path / "out", trust_remote_code=True, **OPTIONS)
    target, donor = Path(recipe["target"]).name, Path(recipe["models"][0]).name
    assert [each.told for each in loaded] == [(target, True, 0), (donor, False, 0)]


def test_a_donor_that_cannot_read_the_prompts_is_a_note(recipe, prompts, tmp_path, monkeypatch):
    def alone(*_):
        raise PromptError("prompt '1': a.png is too small")

    monkeypatch.setattr(executor, "answer_alone", alone)
    found = search(recipe, prompts, tmp_path / "out", **OPTIONS).diagnostics
    assert found.notes == ("the donor alone was not asked: prompt '1': a.png is too small",)


def test_axes_that_meet_hold_for_all_their_tensors(pair, tmp_path):
    """In memory, and in the recipe that is written, every tensor has what its axes say."""
    from omnimerge.engine import with_parameters
    from omnimerge.search.planning import plan_of, space_of

    target, _ = pair
    recipe = {
        "method": "ties", "base": str(target), "models": [str(target), str(target)],
        "parameters": {"scale": 0.5, "density": 0.5},
        "overrides": [
            {"match": {"name": "q_proj"}, "keep": "target"},
            {"match": {"name": "(k|up)_proj"}, "parameters": {"density": 0.9}},
        ],
    }  # fmt: skip
    loaded, space = space_of(
        recipe, ["scale@layers:0=0,1", "density@name:mlp=0.1,0.2", "scale@name:lm_.ead=0,1"], None,
        "scale",
    )  # fmt: skip
    plan, space = plan_of(loaded, space, ())
    chosen = with_parameters(plan, *space.settings((1.0, 0.2, 0.0)))
    written = build_plan(chosen.recipe, ancestor=False)
    for found in (chosen, written):
        jobs = {job.output.name: job for job in found.jobs}
        for name, job in jobs.items():
            if "q_proj" in name:
                assert not job.merged
            if not job.merged:
                continue
            first, mlp = "layers.0." in name, "mlp" in name
            own = "k_proj" in name or "up_proj" in name
            scale = 1.0 if first else 0.0 if "lm_head" in name else 0.5
            density = 0.2 if mlp else 0.9 if own else 0.5
            assert job.parameters["scale"] == scale, name
            assert job.parameters["density"] == density, name


def test_regexes_that_cannot_be_joined_are_refused(recipe, prompts, tmp_path):
    ties = {
        "method": "ties", "base": recipe["target"], "models": [recipe["target"]] * 2,
        "parameters": {"scale": 0.5, "density": 0.5},
    }  # fmt: skip
    axes = ["scale@name:(m)lp=0:1:0.5", r"density@name:(p)_?(r)oj\.we.*(?=\w)=0:1:0.5"]
    options = {**OPTIONS, "grid": axes, "sample": 2, "checks": False}
    joined = search(ties, prompts, tmp_path / "out", **options)
    assert len(joined.points) == 9
    axes[1] = r"density@name:(?P<a>l)ay(?P=a)?=0:1:0.5"
    axes[0] = r"scale@name:(?P<a>m)lp=0:1:0.5"
    with pytest.raises(SearchError, match="meet on some tensors, which no recipe can say"):
        search(ties, prompts, tmp_path / "other", **{**options, "grid": axes})
