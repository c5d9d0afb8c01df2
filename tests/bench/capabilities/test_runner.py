"""The runner with a line that needs no model: what is chosen where, and what is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from omnimerge.bench import builder, grid, results, runner
from omnimerge.bench.line import BenchError
from omnimerge.bench.processes import alone_in
from omnimerge.cli import main
from omnimerge.errors import MethodError

# scale -> (val, test): what is best on val is worst on test.
SCORES = {0.1: (0.1, 0.9), 0.5: (0.6, 0.5), 1.0: (0.5, 0.7)}
# Answers to two prompts: at 0.5 one of them differs from a neighbour's, at 0.1 and 1.0 no choice.
ANSWERS = {0.1: ["a", "b"], 0.5: ["a", "b"], 1.0: ["a", "c"], 1.5: ["x", "y"]}


class FakeSubject:
    def __init__(self, line):
        self.line = line
        self.scale = None

    def put(self, recipe):
        self.scale = recipe["parameters"].get("scale", recipe["parameters"].get("alpha", 0.5))

    def score(self, split):
        self.line.asked.append((split, self.scale))
        value = SCORES[self.scale][split == "test"]
        return {"one": value, "two": value}

    def answers(self):
        return ANSWERS[self.scale]


class FakeLine:
    name = "fake"
    about = "no model"
    columns = ("one", "two")
    experts = ("one", "two")
    references = ("mixture",)
    presets = ("full", "quick")

    def __init__(self):
        self.asked = []
        self.alone_asked = []
        self.builds = []
        self.broken = False
        self.steps = 3

    def settings(self, preset):
        return {"steps": self.steps, "kinds": ("a", "b")}

    def build(self, folder, *, preset, seed, on_progress):
        self.builds.append(seed)
        if self.broken:
            raise BenchError("out of luck")
        for name in self.experts:
            (folder / name).mkdir(exist_ok=True)
        on_progress("learns")

    def recipe(self, folder, method, parameters):
        models = [{"model": str(folder / name)} for name in self.experts]
        return {"method": method, "models": models, "parameters": dict(parameters)}

    def subject(self, folder):
        return FakeSubject(self)

    def alone(self, folder, name, split):
        self.alone_asked.append((name, split))
        return {"one": 0.25, "two": 0.5}

    def warm_up(self, recipe):
        raise AssertionError("measured elsewhere")

    def write(self, recipe, out):
        raise AssertionError("measured elsewhere")

    def check(self, out):
        if self.broken:
            raise MethodError("missing tensors")


@pytest.fixture
def line(monkeypatch):
    def measure(line, recipe, out):
        out.mkdir(exist_ok=True)
        return 2.5, 1000

    monkeypatch.setattr(runner, "measure", measure)
    return FakeLine()


@pytest.fixture
def folder(line, tmp_path):
    return builder.build(
        line, tmp_path / "out", preset="quick", seeds=1, command=["x"], on_progress=print
    )[0]


def go(line, folder, methods=("task_arithmetic",), scales=(0.1, 0.5, 1.0)):
    outcome = runner.run(
        line, folder, methods=methods, scales=scales, command=["x"], on_progress=print
    )
    return {(row.kind, row.name): row for row in outcome.rows}


def test_the_scale_is_chosen_on_val_and_test_is_asked_once(line, folder):
    rows = go(line, folder)

    row = rows["method", "task_arithmetic"]
    assert row.parameters == {"scale": 0.5}  # 0.1 would be the best on test
    assert row.scores == {"one": 0.5, "two": 0.5}
    assert [scale for split, scale in line.asked if split == "test"] == [0.5]
    assert [point.scores["one"] for point in row.points] == [0.1, 0.6, 0.5]
    assert (row.seconds, row.peak_bytes) == (2.5, 1000)
    assert row.average == 0.5


def test_a_folder_without_checkpoints_stays_as_it_is(line, folder):
    (folder / "two").rmdir()
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(BenchError, match=r"seed-0 has no checkpoints in two; give a folder that"):
        go(line, folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_committed_results_are_no_folder_to_run_in(tmp_path):
    """Their build.json alone says that they were built; no seed is touched, nor the first run."""
    committed = Path(__file__).parents[3] / "benchmarks" / "results" / "bench" / "internvl"
    place = tmp_path / "internvl"
    shutil.copytree(committed, place)
    before = sorted(place.rglob("*"))
    result = CliRunner().invoke(main, ["bench", "run", str(place)])
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert (
        "seed-0 has no checkpoints in base, vqa, geometry, chart, ocr, grounding" in result.output
    )
    assert sorted(place.rglob("*")) == before


def test_search_chooses_without_labels(line, folder, monkeypatch):
    monkeypatch.setitem(SCORES, 1.5, (0.9, 0.8))

    rows = go(line, folder, scales=(0.1, 0.5, 1.0, 1.5))

    # Answers changed against a neighbour: 1 at 0.5, 2 at 1.0; none at the ends.
    method, search = rows["method", "task_arithmetic"], rows["search", "task_arithmetic"]
    assert [point.changed for point in method.points] == [None, 1, 2, None]
    assert method.parameters == {"scale": 1.5}
    assert search.parameters == {"scale": 0.5}
    assert search.scores == {"one": 0.5, "two": 0.5}


def test_two_scales_are_too_few_for_search(line, folder):
    rows = go(line, folder, scales=(0.1, 0.5))

    assert ("search", "task_arithmetic") not in rows


def test_single_models_are_scored_on_test(line, folder):
    rows = go(line, folder)

    assert line.alone_asked == [(n, "test") for n in ("base", "one", "two", "mixture")]
    assert rows["base", "base"].average == 0.375
    assert ("reference", "mixture") in rows


def test_a_second_run_makes_nothing_again(line, folder):
    first = go(line, folder)
    line.asked.clear()
    line.alone_asked.clear()

    assert go(line, folder) == first
    assert line.asked == line.alone_asked == []


def test_other_scales_are_run_again(line, folder):
    go(line, folder)
    line.asked.clear()

    rows = go(line, folder, scales=(0.1, 1.0))

    assert rows["method", "task_arithmetic"].parameters == {"scale": 1.0}
    assert ("val", 0.1) in line.asked


def test_an_interrupted_run_goes_on(line, folder):
    line.broken = True
    with pytest.raises(BenchError, match="task_arithmetic: missing tensors"):
        go(line, folder)
    assert not (folder / results.RESULTS_NAME).exists()
    line.broken = False
    line.alone_asked.clear()

    rows = go(line, folder)

    assert line.alone_asked == []  # on disk since the first run
    assert rows["method", "task_arithmetic"].average == 0.5


def test_a_run_that_ended_between_two_rows_makes_both_again(line, folder):
    first = go(line, folder)
    (folder / results.ROWS_NAME / "method-task_arithmetic.json").unlink()
    rows = go(line, folder)
    assert rows.keys() == first.keys() and ("method", "task_arithmetic") in rows
    assert rows["method", "task_arithmetic"].scores == first["method", "task_arithmetic"].scores


def test_methods_that_were_run_before_stay_in_the_results(line, folder):
    go(line, folder, methods=("task_arithmetic", "slerp"))
    rows = go(line, folder, methods=("average",))
    assert [name for kind, name in rows if kind == "method"] == ["average", "task_arithmetic"]
    assert ("search", "task_arithmetic") in rows and ("refused", "slerp") in rows


def test_rows_of_other_versions_are_not_taken(line, folder):
    go(line, folder)
    file = folder / results.ROWS_NAME / results.VERSIONS_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "torch": "1.0"}))
    with pytest.raises(BenchError, match=r"torch 1\.0 then, .* now\); remove that folder"):
        go(line, folder)


def test_rows_of_other_parameters_are_made_again(line, folder, monkeypatch):
    go(line, folder)
    line.asked.clear()
    monkeypatch.setitem(grid.PUBLISHED, "task_arithmetic", {"weights": None})
    rows = go(line, folder)
    assert rows["method", "task_arithmetic"].parameters == {"weights": None, "scale": 0.5}
    assert ("val", 0.1) in line.asked


def test_a_share_without_scales_up_to_one_has_a_reason(line, folder):
    rows = go(line, folder, methods=("adamms",), scales=(1.5,))
    assert "none of the scales is at most 1" in rows["refused", "adamms"].reason


def test_what_is_to_be_kept_is_written_again(line, folder):
    go(line, folder)
    assert not (folder / runner.MERGED / "task_arithmetic").exists()
    runner.run(
        line, folder, methods=("task_arithmetic",), scales=(0.1, 0.5, 1.0), command=["x"],
        on_progress=print, keep=True,
    )  # fmt: skip
    assert (folder / runner.MERGED / "task_arithmetic").is_dir()


def test_seconds_of_interrupted_builds_count(line, tmp_path):
    line.broken = True
    with pytest.raises(BenchError):
        builder.build(line, tmp_path, preset="quick", seeds=1, command=[], on_progress=print)
    file = tmp_path / "seed-0" / "building.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": 1000.0}))
    line.broken = False
    (place,) = builder.build(line, tmp_path, preset="quick", seeds=1, command=[], on_progress=print)
    assert 1000 < results.read(results.Build, place / results.BUILD_NAME).seconds < 1060
    assert not file.exists()


def test_a_place_that_is_no_folder_is_refused(line, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match=r"cannot build in .*file"):
        builder.build(
            line, tmp_path / "file", preset="quick", seeds=1, command=[], on_progress=print
        )


def test_methods_that_do_not_apply_have_a_reason(line, folder):
    rows = go(line, folder, methods=("slerp", "robustmerge", "average"))

    assert rows["refused", "slerp"].reason == "merges 1 model; there are 2 experts"
    assert rows["refused", "slerp"].scores is None
    assert "LoRA adapters only" in rows["refused", "robustmerge"].reason
    assert rows["method", "average"].parameters == {}


def test_adamms_searches_the_share_of_all_donors():
    assert grid.points("adamms", (0.1, 1.0, 1.5)) == [{"alpha": 0.1}, {"alpha": 1.0}]
    assert grid.points("dare_linear", (0.5,)) == [{"density": 0.8, "scale": 0.5}]
    assert grid.points("karcher", (0.5, 1.0)) == [{}]


@pytest.mark.parametrize(
    ("text", "message"),
    [("tiez", "did you mean 'ties'"), (",", "no method is given"), ("all,ties", "unknown method")],
)
def test_unknown_methods(text, message):
    with pytest.raises(BenchError, match=message):
        grid.choose_methods(text)


def test_methods_and_scales_are_read():
    assert grid.choose_methods("ties, tsv,ties") == ["ties", "tsv"]
    assert len(grid.choose_methods("all")) == 35
    assert grid.read_scales("1.0,0.3,0.3") == (0.3, 1.0)


@pytest.mark.parametrize("text", ["", "a", "0", "-1", "inf", "nan"])
def test_scales_that_are_none(text):
    with pytest.raises(BenchError, match=r"write for example 0\.3,0\.5,1\.0"):
        grid.read_scales(text)


def test_a_build_is_marked_last_and_goes_on(line, tmp_path):
    line.broken = True
    with pytest.raises(BenchError, match="out of luck"):
        builder.build(line, tmp_path, preset="full", seeds=2, command=[], on_progress=print)
    assert not (tmp_path / "seed-0" / results.BUILD_NAME).exists()
    with pytest.raises(BenchError, match="seed-0 is not complete"):
        runner.built_folders(tmp_path)
    line.broken = False

    for _ in range(2):
        builder.build(line, tmp_path, preset="full", seeds=2, command=[], on_progress=print)

    assert line.builds == [0, 0, 1]
    assert [place.name for place in runner.built_folders(tmp_path)] == ["seed-0", "seed-1"]


def test_a_folder_of_another_preset_is_refused(line, folder):
    with pytest.raises(BenchError, match="holds fake quick, not fake full"):
        builder.build(line, folder.parent, preset="full", seeds=1, command=[], on_progress=print)


def test_a_folder_begun_with_another_preset_is_refused(line, tmp_path):
    line.broken = True
    with pytest.raises(BenchError):
        builder.build(line, tmp_path, preset="quick", seeds=1, command=[], on_progress=print)

    with pytest.raises(BenchError, match="holds fake quick, not fake full"):
        builder.build(line, tmp_path, preset="full", seeds=1, command=[], on_progress=print)


def test_an_unknown_preset_is_refused(line, tmp_path):
    with pytest.raises(BenchError, match="no preset 'ful', did you mean 'full'"):
        builder.build(line, tmp_path, preset="ful", seeds=1, command=[], on_progress=print)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(BenchError, match="holds no benchmark"):
        runner.built_folders(tmp_path)


def test_unknown_keys_in_a_file_are_refused(folder):
    path = folder / results.BUILD_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))

    with pytest.raises(BenchError, match=r"build\.json is no build file.*colour"):
        results.read(results.Build, Path(path))


def test_a_build_needs_no_folder_that_is_complete(line, folder):
    with alone_in(folder):
        places = builder.build(
            line, folder.parent, preset="quick", seeds=2, command=["x"], on_progress=print
        )
    assert line.builds == [0, 1] and len(places) == 2
    begun = folder.parent / "seed-2"
    begun.mkdir()
    with alone_in(begun), pytest.raises(BenchError, match="another build or run"):
        builder.build(
            line, folder.parent, preset="quick", seeds=3, command=["x"], on_progress=print
        )


def test_a_build_with_other_settings_is_another_build(line, folder):
    line.steps = 4
    with pytest.raises(BenchError, match="with other settings of quick"):
        builder.build(
            line, folder.parent, preset="quick", seeds=1, command=["x"], on_progress=print
        )
    line.broken = True
    with pytest.raises(BenchError, match="out of luck"):
        builder.build(
            line, folder.parent / "other", preset="quick", seeds=1, command=["x"], on_progress=print
        )
    line.broken, line.steps = False, 5
    with pytest.raises(BenchError, match="with other settings of quick"):
        builder.build(
            line, folder.parent / "other", preset="quick", seeds=1, command=["x"], on_progress=print
        )
