"""`omnimerge search` from prompts to report, as a user runs it."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from omnimerge.cli import main


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
    assert "resampling the prompts: 100% choose the same, 95 % 0.2" in said
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
        (["--parameter", "beta", "--param", "alpha=0.1"], "no numeric parameter 'beta'"),
        (["--prompts", "none.jsonl"], "none.jsonl"),
        (["--distance", "exactly"], "unknown distance 'exactly', did you mean 'exact'"),
        (["--grid", "alpha@layer:3=0:0.4:0.2"], "with KEY one of layers, slot, name, component"),
        (["--shares", "0:0.4:0.2"], "shares are of several donors"),
    ],
)
def test_wrong_input_gives_one_line_and_no_folder(work, more, message):
    said = run(work, *more, code=1)
    assert message in said and said.count("\n") == 1
    assert not (work / "out" / "search.json").exists()


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
    said = run(work, "--grid", "alpha=0:0.4:0.2", "--grid", "alpha@slot:mlp=0:0.4:0.2")
    assert "alpha@slot:mlp" in said
    assert "chosen: alpha 0.2, alpha@slot:mlp 0.2, by unanimity" in said


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
