"""A study survives being killed, keeps settings apart, and is alone in its folder."""

import json

import pytest

from omnimerge.errors import SearchError
from omnimerge.generate import Prompt, Response
from omnimerge.search import Study, accuracy
from omnimerge.search.guards import diagnose, noise_floor, resampled
from omnimerge.search.scoring import Scoring
from omnimerge.search.session import Session
from omnimerge.search.space import Space
from omnimerge.search.store import AnswerStore

POINTS = (0.0, 0.1, 0.2, 0.125 + 0.1)
SETTINGS = {"recipe": {"method": "adamms"}, "max_new_tokens": 8}


class Evaluator:
    """Answers every prompt with the point; stops like a killed process at `dies_at`."""

    def __init__(self, ids=("a", "b"), dies_at=None, after=0):
        self.ids, self.dies_at, self.after = ids, dies_at, after
        self.asked, self.drafts = [], {}

    def run(self, tasks):
        for task in tasks:
            (point,) = task.point
            self.asked.append(point)
            self.drafts[point] = [draft.text for draft in task.drafts]
            for number, prompt in enumerate(task.prompts):
                if point == self.dies_at and number == self.after:
                    raise KeyboardInterrupt
                yield task, [(number, Response(prompt.id, f"{prompt.id}\u2028{point}", (1, 2)))]

    def close(self):
        pass


def run(folder, evaluate, settings=SETTINGS, points=POINTS, ids=None, **options):
    ids = ids or evaluate.ids
    space = Space.of([",".join(map(str, points))])
    with Study(folder, settings, ids, **options) as study:
        session = Session(
            folder,
            evaluate,
            Scoring.of("unanimity", "exact", None),
            [Prompt(i, "?") for i in ids],
            [],
            study.store,
            AnswerStore(folder / "heldout", []),
            None,
        )
        session.evaluate(space, refine=0, trials=None, seed=0)
    return [session.answers[point] for point in space.points]


def test_points_are_answered_in_order_into_files(tmp_path):
    evaluate = Evaluator()
    answers = run(tmp_path / "s", evaluate)

    assert evaluate.asked == list(POINTS)
    assert evaluate.drafts[0.0] == []  # the first has no neighbour yet
    assert evaluate.drafts[0.2] == ["a\u20280.1", "b\u20280.1"]
    assert answers[1] == [Response("a", "a\u20280.1", (1, 2)), Response("b", "b\u20280.1", (1, 2))]
    assert sorted(f.name for f in (tmp_path / "s" / "responses").iterdir()) == [
        "alpha_0.00.jsonl", "alpha_0.10.jsonl", "alpha_0.20.jsonl", "alpha_0.225.jsonl",
    ]  # fmt: skip
    first = (tmp_path / "s" / "responses" / "alpha_0.10.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"id": "a", "response": "a\u20280.1", "tokens": [1, 2]}


def test_after_a_kill_only_the_rest_is_evaluated(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Evaluator(dies_at=0.2))
    again = Evaluator()
    resumed = run(tmp_path, again)

    assert again.asked == [0.2, 0.225]
    assert resumed == run(tmp_path / "fresh", Evaluator())


def test_after_a_kill_in_a_point_its_first_answers_are_kept(tmp_path):
    class Counting(Evaluator):
        def run(self, tasks):
            for task, answers in super().run(tasks):
                self.asked += [(task.point, response.id) for _, response in answers]
                yield task, answers

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counting(dies_at=0.1, after=1))
    with (tmp_path / "responses" / ".alpha_0.10.jsonl.begun").open("a") as file:
        file.write('{"id": "b", "respon')  # cut off by the kill
    again = Counting()
    resumed = run(tmp_path, again)
    asked = [each for each in again.asked if isinstance(each, tuple)]
    assert asked == [((0.1,), "b"), *(((p,), i) for p in (0.2, 0.225) for i in "ab")]
    assert resumed == run(tmp_path / "fresh", Evaluator())
    assert not list((tmp_path / "responses").glob(".*"))


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
    store = AnswerStore(tmp_path, ["a", "b", "c"])
    with pytest.raises(SearchError, match=r"2 answers at alpha_0.10 do not match the 3 prompts"):
        store.write("alpha_0.10", [Response("a", ""), Response("b", "")])


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


def at(*values):
    return [{"alpha": value} for value in values]


def test_agreement_with_the_parents():
    answers = texts(["a", "b"], ["A", "c"], ["x", "c"])
    target, donor = texts(["a", "b"], ["x", "c"])
    found = diagnose(at(0.0, 0.1, 0.2), answers, (None, 1.0, None), target=target, donor=donor)
    assert [p.like_target for p in found.points] == [1.0, 0.5, 0.0]
    assert [p.like_donor for p in found.points] == [0.0, 0.5, 1.0]


def test_the_noise_floor_is_compared_with_the_scores():
    (once,) = texts(["a", "b", "c", "d"])
    (again,) = texts(["A", "x", "y", "d"])
    noise = noise_floor({"alpha": 0.1}, once, again)
    assert (noise.prompts, noise.differing) == (4, 2)
    answers = texts(["a", "b", "c", "d"], ["a", "b", "c", "e"], ["a", "q", "c", "e"])
    loud = diagnose(at(0.0, 0.1, 0.2), answers, (None, 1.0, 2.0), noise=noise)
    assert any("2 of 4 answers differ when nothing" in warning for warning in loud.warnings)
    calm = diagnose(at(0.0, 0.1, 0.2), answers, (None, 0.0, 4.0), noise=noise)
    assert not any("nothing but chance" in warning for warning in calm.warnings)


def test_the_bootstrap_of_a_clear_choice_and_of_a_tie():
    def score(answers):  # how many answers are not "x", at each point
        return [float(sum(a != "x" for a in here)) for here in answers]

    clear = resampled(at(0.1, 0.2, 0.3), [["y"] * 20, ["x"] * 20, ["y"] * 20], score)
    assert clear.same == 1.0 and clear.interval == {"alpha": (0.2, 0.2)}
    tied = resampled(at(0.1, 0.2), [["x"] * 20, ["X"] * 20], lambda a: [0.0 for _ in a])
    assert tied.same == 0.0 and tied.interval == {"alpha": (0.1, 0.1)}  # nothing decides
    halves = [["x"] * 10 + ["y"] * 10, ["y"] * 10 + ["x"] * 10]
    open_ = resampled(at(0.1, 0.2), halves, score, samples=4000)
    # The first is chosen by all of the 20 prompts together, as the tie rule says. Alone it is best
    # where of 20 draws fewer than 10 hit what it differs in: (1 - C(20, 10) / 2^20) / 2 = 0.41.
    assert open_.same == pytest.approx(0.41, abs=0.03) and open_.interval == {"alpha": (0.1, 0.2)}
    again = resampled(at(0.1, 0.2), halves, score, samples=4000)
    assert open_ == again
    assert resampled(at(0.1), [["x"]], lambda answers: [None]) is None
    assert resampled(at(0.1), [["x"]], lambda answers: [1.0]) is None  # nothing to choose from


def test_diagnostics_count_what_they_say():
    answers = texts(["a", "bb"], ["A", ""], ["a", "c"])
    found = diagnose(at(0.0, 0.1, 0.2), answers, (2.0, 1.0, None))
    # prompt 1 never changes (case aside), prompt 2 does; at 0.1 half of the answers are empty
    assert found.changed_prompts == 1
    assert [p.distinct_rate for p in found.points] == [1.0, 1.0, 1.0]
    assert [p.empty_rate for p in found.points] == [0.0, 0.5, 0.0]
    assert [p.mean_tokens for p in found.points] == [1.5, 0.5, 1.0]
    assert [p.mean_characters for p in found.points] == [1.5, 0.5, 1.0]
    blank = diagnose(at(0.0, 0.1), texts(["a", " \n"], ["b", "c"]), (1.0, 2.0))
    assert [p.empty_rate for p in blank.points] == [0.5, 0.0]
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
        (
            [["a", "a"], ["b", "a"], ["b", "c"]],
            (None, 1.0, None),
            ["only one point has the neighbours", "every prompt gets the same answer at alpha 0:"],
        ),
        ([["a", "b"], ["c", "b"], ["c", "d"], ["c", "d"]], (None, 2.0, 1.0, None), []),
        (
            [["a", "b"], ["c", "b"], ["c", "d"], ["c", "d"], ["c", "e"]],
            (None, 1.0, 1.0, 2.0, None),
            ["alpha 0.1, 0.2 tie at 1: the choice among them is the tie rule's"],
        ),
    ],
)
def test_warnings(rows, scores, expected):
    points = at(*(i / 10 for i in range(len(rows))))
    warnings = diagnose(points, texts(*rows), scores, ceilings=[1.0] * len(rows)).warnings
    assert len(warnings) == len(expected)
    assert all(part in warning for part, warning in zip(expected, warnings, strict=True))


def test_saturation_is_measured_by_what_a_score_can_be():
    rows = texts(*(["a" * (i + 1), "b"] for i in range(5)))  # one of two prompts always changes
    points = at(0.0, 0.1, 0.2, 0.3, 0.4)
    space = Space.of(["0:0.4:0.1"])
    for criterion, ceiling, scores in (
        ("unanimity", [None, 1.0, 1.0, 1.0, None], (None, 1.0, 1.0, 1.0, None)),
        ("pairwise", [None, 2.0, 2.0, 2.0, None], (None, 2.0, 2.0, 2.0, None)),  # of 4, not of 2
        ("backward", [None, 1.0, 1.0, 1.0, 1.0], (None, 1.0, 1.0, 1.0, 1.0)),
    ):
        scoring = Scoring.of(criterion, "exact", None)
        assert scoring.ceilings(space, space.points) == ceiling
        found = diagnose(points, rows, scores, ceilings=ceiling)
        assert not any("nearly every answer" in warning for warning in found.warnings)
        full = [None if c is None else 2 * c for c in ceiling]
        found = diagnose(points, rows, full, ceilings=ceiling)
        assert any("nearly every answer" in warning for warning in found.warnings)
    # Two axes: four neighbours.
    both = Space.of(["0:0.2:0.1", "density=0:1:0.5"])
    ceilings = Scoring.of("pairwise", "exact", None).ceilings(both, both.points)
    assert [c for c in ceilings if c is not None] == [4.0]
    assert Scoring.of("unanimity", "edit", None).ceilings(space, space.points) is None


def test_answers_that_have_nearly_all_become_one():
    mixed = [str(i) for i in range(100)]
    near = ["Same "] * 95 + mixed[:5]
    rows = texts(mixed, near, ["same"] * 94 + mixed[:6])
    warnings = diagnose(at(0.0, 0.1, 0.2), rows, (1.0, 2.0, 3.0)).warnings
    assert [w for w in warnings if "same answer" in w] == [
        "95% of the prompts or more get the same answer at alpha 0.1: constant answers look "
        "consistent without being good; look at the responses"
    ]
    (usual,) = texts(["same"] * 96 + mixed[:4])  # the prompts' fault, not the merge's
    warnings = diagnose(at(0.0, 0.1, 0.2), rows, (1.0, 2.0, 3.0), target=usual).warnings
    assert not [w for w in warnings if "same answer" in w]


def test_followed_tokens_are_no_texts():
    answers = [[Response("a", "", (1, 2)), Response("b", "", (3,))] for _ in range(4)]
    followed = [["1 2", "3"], ["1 2", "3"], ["1 4", "3"], ["1 4", "3"]]
    found = diagnose(at(0.0, 0.1, 0.2, 0.3), answers, (None, 0.5, 0.7, None), texts=followed)
    assert found.changed_prompts == 1 and found.warnings == ()
    assert found.points[0].model_dump() == {
        "values": {"alpha": 0.0}, "distinct_rate": None, "empty_rate": None, "mean_tokens": None,
        "mean_characters": None, "like_target": None, "like_donor": None,
    }  # fmt: skip


def test_the_differing_setting_is_shown_however_deep_it_is(tmp_path):
    recipe = {"method": "adamms", "overrides": [{"match": {"name": "x" * 200}, "parameters": {}}]}
    settings = {**SETTINGS, "recipe": recipe, "prompts": "a" * 64}
    run(tmp_path, Evaluator(), settings)
    other = json.loads(json.dumps(settings))
    other["recipe"]["overrides"][0]["parameters"]["alpha"] = 0.2
    other["recipe"]["seed"] = 1
    with pytest.raises(SearchError) as error:
        run(tmp_path, Evaluator(), {**other, "prompts": "b" * 64})
    assert (
        "(recipe.overrides.0.parameters.alpha: null there, 0.2 here; recipe.seed: null there, "
        "1 here; prompts: other prompts, or another --sample or --seed)"
    ) in str(error.value)


def test_other_settings_without_answers_leave_nothing_of_the_old_ones(tmp_path):
    run(tmp_path, Evaluator())
    for name in ("checks/target.jsonl", "heldout/alpha_0.10.jsonl", "search.json", "report.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    for file in (tmp_path / "responses").iterdir():
        file.unlink()
    run(tmp_path, Evaluator(), {**SETTINGS, "max_new_tokens": 16})
    left = {f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*") if f.is_file()}
    assert left == {".lock", "settings.json", *(f"responses/alpha_{p}.jsonl" for p in (
        "0.00", "0.10", "0.20", "0.225"))}  # fmt: skip


def test_overwriting_leaves_no_old_result(tmp_path):
    run(tmp_path, Evaluator())
    for name in ("search.json", "recipe.yaml", "mapping.json", "report.html", "mine.txt"):
        (tmp_path / name).write_text("old")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Evaluator(dies_at=0.0), overwrite=True)
    assert sorted(f.name for f in tmp_path.iterdir() if f.is_file()) == [
        ".lock", "mine.txt", "settings.json"
    ]  # fmt: skip
    own = tmp_path / "own"  # no search's folder: a recipe.yaml in it is the user's
    own.mkdir()
    (own / "recipe.yaml").write_text("method: adamms")
    run(own, Evaluator(), overwrite=True)
    assert (own / "recipe.yaml").read_text() == "method: adamms"


def test_answers_of_other_versions_are_kept_with_a_note(tmp_path):
    run(tmp_path, Evaluator(), versions={"torch": "2.12", "python": "3.11"})
    newer = {"torch": "2.13", "python": "3.11"}
    for _ in range(2):  # the note stays as long as the answers do
        with Study(tmp_path, SETTINGS, ["a", "b"], versions=newer) as study:
            assert study.notes == ["the first answers in this folder are of torch 2.12 (now 2.13)"]
    again = Evaluator()
    run(tmp_path, again, versions=newer, overwrite=True)
    assert again.asked == list(POINTS)
    with Study(tmp_path, SETTINGS, ["a", "b"], versions=newer) as study:
        assert study.notes == []


def test_one_point_is_scored_as_all_are():
    for texts_, per_step in ((["0:0.4:0.1"], None), (["0,0.1,0.3,0.4,0.6"], None)):
        space = Space.of(texts_)
        scoring = Scoring.of("pairwise", "exact", per_step)
        answers = {p: texts(["a" * (i // 2), "b" * i])[0] for i, p in enumerate(space.points)}
        whole = scoring.scores(space, answers)
        assert {p: scoring.score_at(space, answers, p) for p in space.points} == whole
        assert scoring.choosable(space) == [p for p, s in whole.items() if s is not None]


def test_trials_of_shares_propose_points_that_can_be_chosen():
    pytest.importorskip("optuna")
    from omnimerge.search.sampling import sample_points

    space = Space.simplex("0:0.4:0.1", 2)
    choosable = Scoring.of("unanimity", "exact", None).choosable(space)
    assert choosable == [(0.1, 0.1), (0.1, 0.2), (0.2, 0.1)]
    done, scored = set(), []

    def score(point):
        scored.append(point)
        return sum(point)

    sample_points(space, 8, 0, choosable=choosable, answer=done.update, answered=done, score=score)
    assert len(scored) == 8 and set(scored) <= set(choosable) and len(set(scored)) > 1
    near = {(x + i / 10, y + j / 10) for x, y in scored for i, j in ((1, 0), (0, 1))}
    assert {tuple(round(v, 9) for v in p) for p in near} <= done  # neighbours are answered too
