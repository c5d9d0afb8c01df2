"""`omnimerge search` from prompts to report, as a user runs it."""

import json
import os
import shutil
import signal

import pytest
from click.testing import CliRunner
from PIL import Image
from small_merge import files

from omnimerge.checkpoint import journal, writer
from omnimerge.cli import main
from omnimerge.engine import execute


@pytest.fixture
def work(answering_pair, tmp_path):
    """A folder with a recipe without alpha, prompts, and labelled prompts."""
    target, donor = answering_pair
    (tmp_path / "recipe.yaml").write_text(f"method: adamms\ntarget: {target}\nmodels: [{donor}]\n")
    Image.new("RGB", (56, 56), (200, 30, 30)).save(tmp_path / "a.png")
    rows = [{"id": i, "prompt": "what " * (i + 1), "image": "a.png"} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    labelled = [{**row, "answer": "x"} for row in rows]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(r) + "\n" for r in labelled))
    return tmp_path


def run(work, *more, code=0):
    arguments = ["search", work / "recipe.yaml", "--prompts", work / "prompts.jsonl"]
    arguments += ["-o", work / "out", "--max-new-tokens", "3", *more]
    if not {"--grid", "--shares", "--preset"} & set(map(str, more)):
        arguments += ["--grid", "0:0.4:0.2"]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_table_files_and_report(work):
    said = run(work, "--heldout", work / "labelled.jsonl")
    assert "<- chosen" in said and "accuracy" in said
    assert "chosen: alpha 0.2, by unanimity on 6 prompts without labels" in said
    result = json.loads((work / "out" / "search.json").read_text())
    assert {"points", "selected", "criterion", "diagnostics"} <= set(result)
    assert [p["values"] for p in result["points"]] == [{"alpha": a} for a in (0.0, 0.2, 0.4)]
    assert set(result["points"][0]) >= {"values", "score", "responses"}
    assert "best score at: 0.2; rule: smallest score; of equal scores the smallest" in said
    assert "warning: only one point has the neighbours" in said
    assert "resampling" not in said  # one point says nothing
    assert "noise floor: 0 of 6 answers differ when the chosen point is answered twice" in said
    assert f"recipe with the choice: {work / 'out' / 'recipe.yaml'}" in said
    assert len((work / "out" / result["points"][1]["responses"]).read_text().splitlines()) == 6
    assert (work / "out" / "report.html").is_file()
    assert not list(work.glob("**/*.safetensors"))  # no checkpoint is written


def test_json_is_search_json(work):
    said = json.loads(run(work, "--json"))
    assert said == json.loads((work / "out" / "search.json").read_text())


def test_other_settings_into_the_same_folder_are_refused(work):
    run(work)
    said = run(work, "--param", "alpha=0.1", "--max-new-tokens", "4", code=1)
    assert "other settings" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--grid", "0:0.1:0.1"], "give at least three values for each axis"),
        (["--grid", "0:2:0.5"], "is not in [0, 1]"),
        (["--parameter", "beta"], "adamms has no numeric parameter 'beta'"),
        (["--parameter", "beta", "--param", "alpha=0.1"], "no numeric parameter 'beta'"),
        (["--grid", "alpha@layers:0=0:0.4:0.2"], "set the others with --param alpha=..."),
        (["--grid", "alpha@name:(=0:0.6:0.1", "--param", "alpha=0.1"], "is no regular expression"),
        (["--device", "cuda:9"], "device 'cuda:9' cannot be used here"),
        (["--prompts", "none.jsonl"], "none.jsonl"),
        (["--distance", "exactly"], "unknown distance 'exactly', did you mean 'exact'"),
        (["--grid", "alpha@layer:3=0:0.4:0.2"], "with KEY one of layers, slot, name, component"),
        (["--shares", "0:0.4:0.2"], "shares are of several donors"),
    ],
)
def test_wrong_input_gives_one_line_and_no_folder(work, more, message):
    said = run(work, *more, code=1)
    assert message in said and said.count("\n") == 1
    assert not (work / "out").exists()


def test_a_broken_prompt_file_is_explained(work):
    (work / "prompts.jsonl").write_text('{"id": 1, "promt": "x"}\n{"id": 1, "prompt": "y"}\n')
    said = run(work, code=1)
    assert "promt" in said and "did you mean 'prompt'" in said and "line" in said


def test_a_preset_sets_what_the_command_line_does_not_say(work):
    run(work, "--preset", "adamms-qwen", "--grid", "0:0.4:0.2")
    result = json.loads((work / "out" / "search.json").read_text())
    assert result["criterion"] == "backward"
    assert result["axes"] == [{"name": "alpha", "grid": [0.0, 0.2, 0.4]}]


def test_several_axes_in_the_table(work):
    said = run(work, "--grid", "alpha=0:0.4:0.2", "--grid", "alpha@slot:mlp=0:0.6:0.2")
    assert "alpha@slot:mlp" in said
    result = json.loads((work / "out" / "search.json").read_text())
    scores = {p["values"]["alpha@slot:mlp"]: p["score"] for p in result["points"] if p["score"]}
    best = min(scores, key=scores.get)
    assert f"chosen: alpha 0.2, alpha@slot:mlp {best:g}, by unanimity" in said
    assert f"best score at: alpha 0.2, alpha@slot:mlp {best:g}" in said
    assert "resampling the prompts: " in said and "choose the same alone, 95 % 0.2, " in said


def test_candidates_are_written_once(work):
    arguments = ["candidates", work / "recipe.yaml", "-o", work / "c", "--grid", "0:0.4:0.2"]
    first = CliRunner().invoke(main, [str(a) for a in arguments])
    assert first.exit_code == 0, first.output
    assert first.output.count(": written") == 3
    listed = json.loads((work / "c" / "candidates.json").read_text())["candidates"]
    assert [entry["folder"] for entry in listed] == ["alpha_0.00", "alpha_0.20", "alpha_0.40"]
    assert all((work / "c" / entry["folder"] / "config.json").is_file() for entry in listed)
    manifest = json.loads((work / "c" / "alpha_0.20" / "merge_manifest.json").read_text())
    assert manifest["recipe"]["parameters"] == {"alpha": 0.2}
    again = CliRunner().invoke(main, [str(a) for a in arguments])
    assert again.output.count("there already") == 3
    (work / "recipe.yaml").write_text(
        (work / "recipe.yaml").read_text() + "overrides: [{match: {layers: '0'}, keep: target}]\n"
    )
    other = CliRunner().invoke(main, [str(a) for a in arguments])
    assert other.exit_code == 1 and "candidates of another recipe" in other.output
    assert "recipe.overrides" in other.output and other.output.count("\n") == 1


def candidates(work, *more, grid="0:0.4:0.2", out="c", code=0):
    arguments = ["candidates", work / "recipe.yaml", "-o", work / out, "--grid", grid, *more]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    assert result.output.count("Error: ") == code
    return result.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_candidates_that_were_stopped_go_on(work, number, monkeypatch):
    monkeypatch.setattr(journal, "INTERVAL", 0.0)
    candidates(work, out="whole")
    child = os.fork()
    if not child:
        _stop_within_the_second(number)
        try:
            candidates(work)
        except AssertionError as error:  # of Ctrl-C
            os._exit(100 * ("The same command goes on." not in str(error)))
        os._exit(99)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == (0 if number == signal.SIGINT else -number)
    assert (work / "c" / ".alpha_0.20.omnimerge").is_dir()
    said = candidates(work)
    assert (said.count(": written"), said.count("there already")) == (2, 1)
    for name in ("alpha_0.00", "alpha_0.20", "alpha_0.40"):
        assert files(work / "c" / name) == files(work / "whole" / name)
    assert not list((work / "c").glob(".*"))


def _stop_within_the_second(number):
    """Send a signal to this process when half of its second output is on disk."""
    begin, begun = writer.Journal.__init__, []

    def noted(self, *arguments):
        begin(self, *arguments)
        begun.append(self)

    def advance(self, written, report=execute._Meter.report):
        report(self, written)
        if len(begun) == 2 and self._done > self._total // 2:
            begun[1].note()
            os.kill(os.getpid(), number)

    writer.Journal.__init__ = noted
    execute._Meter.report = advance


def test_candidates_of_another_grid_are_added(work):
    candidates(work, grid="0.2:0.6:0.2")
    said = candidates(work)  # it starts elsewhere, which is no other recipe
    assert (said.count(": written"), said.count("there already")) == (1, 2)
    listed = json.loads((work / "c" / "candidates.json").read_text())["candidates"]
    assert [entry["values"]["alpha"] for entry in listed] == [0.2, 0.4, 0.6, 0.0]


def test_what_is_no_finished_candidate_is_not_taken_for_one(work):
    candidates(work)
    merged = work / "c" / "alpha_0.20"
    manifest = json.loads((merged / "merge_manifest.json").read_text())
    for file in (work / "c" / "alpha_0.40").iterdir():
        file.unlink()
    assert candidates(work).count(": written") == 1  # into the empty folder
    assert (work / "c" / "alpha_0.40" / "config.json").is_file()
    manifest["recipe"]["parameters"]["alpha"] = 0.3
    (merged / "merge_manifest.json").write_text(json.dumps(manifest))
    assert f"{merged} is there, and is no checkpoint of this point" in candidates(work, code=1)
    (merged / "merge_manifest.json").unlink()
    assert "is no checkpoint of this point" in candidates(work, code=1)


def test_candidates_that_were_stopped_belong_to_their_recipe_and_parents(
    work, answering_pair, monkeypatch
):
    from omnimerge import engine

    plain, stops = engine.run_plan, iter([False, True])

    def stopped(*arguments, **options):
        if next(stops, False):
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    donor = shutil.copytree(answering_pair[1], work / "donor")
    (work / "recipe.yaml").write_text(
        f"method: adamms\ntarget: {answering_pair[0]}\nmodels: [donor]\n"
    )
    monkeypatch.setattr(engine, "run_plan", stopped)
    arguments = ["candidates", str(work / "recipe.yaml"), "-o", str(work / "c")]
    assert CliRunner().invoke(main, [*arguments, "--grid", "0:0.4:0.2"]).exit_code != 0
    said = candidates(work, "--select", "all", code=1)
    assert "recipe.select: null there" in said
    file = donor / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "models: other checkpoints, or changed files" in candidates(work, code=1)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": {}, "candidates": [3]}'])
def test_a_damaged_list_of_candidates_is_named(work, content):
    (work / "c").mkdir()
    (work / "c" / "candidates.json").write_text(content)
    said = candidates(work, code=1)
    assert f"{work / 'c' / 'candidates.json'} is no list of candidates" in said


def test_candidates_do_not_go_into_a_searchs_folder(work):
    run(work)
    assert "is not empty and holds no candidates" in candidates(work, out="out", code=1)


def test_axes_have_files_of_their_own(work):
    """Two axes whose names differ in signs only, in one folder."""
    for regex in ("q|k", "q?k"):
        run(work, "--grid", f"alpha@name:{regex}=0:0.6:0.3", "--param", "alpha=0", "--no-checks")
    files = sorted(file.name for file in (work / "out" / "responses").iterdir())
    assert len(files) == 6
    names = [json.loads((work / "out" / "search.json").read_text())["points"][1]["responses"]]
    assert names[0].removeprefix("responses/") in files


def test_steps_that_are_divided_by_are_told(work):
    assert "note: distances are divided by the step" in run(work, "--grid", "0,0.1,0.3,0.6")
