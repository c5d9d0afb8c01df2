"""The quick preset through the command line, from nothing to the table: merging must pay."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from omnimerge.bench import runner
from omnimerge.bench.capabilities.presets import PRESETS
from omnimerge.cli import main

METHODS = "average,task_arithmetic,ties,optmerge"


@pytest.fixture
def call():
    def run(*arguments):
        result = CliRunner().invoke(main, ["bench", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def shorter(monkeypatch):
    """What the test does not look at: the mixture learns little, no merge is measured."""
    quick = PRESETS["internvl"]["quick"]
    few = replace(quick, mixture=replace(quick.mixture, steps=10))
    monkeypatch.setitem(PRESETS["internvl"], "quick", few)

    def measure(line, recipe, out):  # here: the fresh process has a test of its own
        line.write(recipe, out)
        return 1.0, None

    monkeypatch.setattr(runner, "measure", measure)


@pytest.mark.usefixtures("shorter")
def test_quick_internvl_merges_beat_base_and_every_expert(call, tmp_path):
    out = str(tmp_path / "internvl")
    call("build", "--line", "internvl", "--preset", "quick", "-o", out)
    call("run", out, "--methods", METHODS, "--scales", "0.5,1.0")
    (table,) = json.loads(call("table", out, "--json"))

    averages = {
        (row["kind"], row["name"]): row["cells"]["average"]["mean"] for row in table["lines"]
    }
    best_method = max(value for (kind, _), value in averages.items() if kind == "method")
    single = {key: value for key, value in averages.items() if key[0] in ("base", "expert")}
    assert len(single) == 6
    assert best_method > max(single.values()), averages
    for method in METHODS.split(","):
        assert averages["method", method] > averages["base", "base"], averages


def test_errors_are_one_line(tmp_path):
    for arguments, message in [
        (["build", "--line", "internvk", "-o", str(tmp_path)], "did you mean 'internvl'"),
        (
            ["build", "--line", "qwen2vl", "--preset", "x", "-o", str(tmp_path)],
            "it has: full, quick",
        ),
        (["run", str(tmp_path)], "holds no benchmark"),
        (["run", str(tmp_path), "--methods", "tie"], "unknown method 'tie'"),
        (["table", str(tmp_path)], "holds no benchmark"),
    ]:
        result = CliRunner().invoke(main, ["bench", *arguments])

        assert result.exit_code == 1, result.output
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
