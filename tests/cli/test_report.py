"""`omnimerge report`: the page of a search that is there, or one line that says why not."""

import json

import pytest
from click.testing import CliRunner

from omnimerge.cli import main


@pytest.fixture
def searched(tmp_path):
    """The folder of a search, as small as the schema allows."""
    source = {"file": "p.jsonl", "sha256": "", "count": 1, "sample": None, "seed": 0}
    values = [{"alpha": alpha} for alpha in (0.0, 0.1, 0.2)]
    result = {
        "points": [
            {"values": v, "score": 0.0 if v["alpha"] == 0.1 else None, "responses": f"r/{i}.jsonl"}
            for i, v in enumerate(values)
        ],
        "selected": {"alpha": 0.1},
        "criterion": "unanimity",
        "axes": [{"name": "alpha", "grid": [0.0, 0.1, 0.2]}],
        "tie_set": [{"alpha": 0.1}],
        "grid": "0:0.2:0.1",
        "prompts": source,
        "max_new_tokens": 4,
        "diagnostics": {"points": [], "changed_prompts": 0, "warnings": []},
        "recipe": {},
        "versions": {},
        "elapsed_s": 1,
    }
    folder = tmp_path / "search"
    (folder / "r").mkdir(parents=True)
    (folder / "search.json").write_text(json.dumps(result))
    for i in range(3):
        row = {"id": "q", "response": "yes", "tokens": []}
        (folder / "r" / f"{i}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def run(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_the_page_is_written_into_the_folder(searched):
    result = run(searched)
    assert result.exit_code == 0, result.output
    assert result.output == f"report: {searched / 'report.html'}\n"
    assert "Chosen: alpha = 0.1." in (searched / "report.html").read_text()


def test_or_where_it_is_told(searched, tmp_path):
    file = tmp_path / "pages" / "a.html"
    assert run(searched, "-o", file).output == f"report: {file}\n"
    assert file.is_file() and not (searched / "report.html").exists()


def test_no_search_is_one_line(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert result.output.startswith(f"Error: cannot read {tmp_path / 'search.json'}")
    assert "run the search first" in result.output


def test_a_damaged_search_is_one_line(searched):
    (searched / "search.json").write_text("{")
    result = run(searched)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1 and "no search result" in result.output


def test_a_page_that_cannot_be_written_is_one_line(searched, tmp_path):
    result = run(searched, "-o", tmp_path)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1 and "cannot write" in result.output
