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
    arguments += ["-o", work / "out", "--grid", "0:0.4:0.2", "--max-new-tokens", "3", *more]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_table_files_and_report(work):
    said = run(work, "--heldout", work / "labelled.jsonl")
    assert "<- chosen" in said and "accuracy" in said
    assert "chosen: alpha 0.2, by unanimity on 6 prompts without labels" in said
    result = json.loads((work / "out" / "search.json").read_text())
    assert {"points", "selected", "criterion", "diagnostics"} <= set(result)
    assert [p["alpha"] for p in result["points"]] == [0.0, 0.2, 0.4]
    assert set(result["points"][0]) >= {"alpha", "score", "responses"}
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
        (["--grid", "0:0.1:0.1"], "points"),
        (["--grid", "0:2:0.5"], "is not in [0, 1]"),
        (["--parameter", "beta", "--param", "alpha=0.1"], "no numeric parameter 'beta'"),
        (["--prompts", "none.jsonl"], "none.jsonl"),
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
