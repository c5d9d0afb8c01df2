"""`omnimerge demo`, whole: merging helps, the choice without labels is near the best one."""

import json
import re

import pytest
from click.testing import CliRunner

from omnimerge.cli import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    result = CliRunner().invoke(main, ["demo", "-o", str(out)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return out, result.output


def accuracies(said):
    """The last row of the closing table: target, donor, merged."""
    (row,) = re.findall(r"^ all +13 +([\d.]+) +([\d.]+) +([\d.]+)", said, flags=re.M)
    return [float(value) for value in row]


def test_the_merged_model_beats_both_parents(demo):
    target, donor, merged = accuracies(demo[1])
    assert merged >= max(target, donor) + 0.1


def test_the_choice_without_labels_is_within_a_step_of_the_best(demo):
    result = json.loads((demo[0] / "search" / "search.json").read_text())
    best = max(result["points"], key=lambda point: point["accuracy"])["values"]["alpha"]
    assert abs(result["selected"]["alpha"] - best) < 0.11
    assert 0 < result["selected"]["alpha"] < 0.6


def test_the_reloaded_checkpoint_answers_as_the_search_saw(demo):
    result = json.loads((demo[0] / "search" / "search.json").read_text())
    seen = {point["values"]["alpha"]: point["accuracy"] for point in result["points"]}
    target, _, merged = accuracies(demo[1])
    assert merged == pytest.approx(seen[result["selected"]["alpha"]], abs=5e-4)
    assert target == pytest.approx(seen[0.0], abs=5e-4)


def test_it_says_every_command_and_writes_the_report(demo):
    for command in ("inspect", "map", "search", "merge"):
        assert f"$ omnimerge {command}" in demo[1]
    assert (demo[0] / "search" / "report.html").is_file()
    assert (demo[0] / "merged" / "README.md").is_file()


def test_no_label_is_in_the_prompts_of_the_search(demo):
    lines = (demo[0] / "prompts" / "prompts.jsonl").read_text().splitlines()
    assert len(lines) == 100
    assert all(set(json.loads(line)) == {"id", "prompt", "image"} for line in lines)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    result = CliRunner().invoke(main, ["demo", "-o", str(tmp_path)])
    assert result.exit_code == 1 and "holds files of yours" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
