"""`omnimerge convert`, through the entry point a user has."""

import pytest
import yaml
from click.testing import CliRunner

from omnimerge.cli import main
from omnimerge.engine import load_recipe

CONFIG = """\
models:
  - model: base
  - model: a
    parameters: {weight: 0.3, density: 0.5}
  - model: b
    parameters:
      density: 0.5
      weight:
        - {filter: self_attn, value: [0, 1]}
        - value: 0.5
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16
tokenizer_source: base
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "mergekit.yml"
    file.write_text(CONFIG)
    return file


def run(*arguments, code=0):
    result = CliRunner().invoke(main, ["convert", *(str(a) for a in arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def test_the_recipe_is_printed_with_comments(config, tmp_path):
    text = run(config, "--layers", 2)
    assert text.startswith("# From mergekit.yml") and "# int8_mask was left out" in text
    assert "weights: [0.3, 1.0]" in text and "&id" not in text
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.method == "ties" and recipe.base == "base" and recipe.dtype == "bfloat16"
    assert recipe.all_parameters["weights"] == [0.3, 0.5]
    assert [o.match.layers for o in recipe.overrides] == ["0", "1"]
    assert {o.match.name for o in recipe.overrides} == {"self_attn"}


def test_out_is_a_new_file(config, tmp_path):
    out = tmp_path / "recipe.yaml"
    assert f"omnimerge plan {out}" in run(config, "--layers", 2, "-o", out)
    assert yaml.safe_load(out.read_text())["method"] == "ties"
    out.write_text("mine")
    assert "File exists" in run(config, "--layers", 2, "-o", out, code=1)
    assert out.read_text() == "mine"


def test_what_has_no_equivalent_is_listed_line_by_line(config, tmp_path):
    config.write_text(CONFIG.replace("dtype: bfloat16", "dtype: float64\ndtyp: 1"))
    out = tmp_path / "recipe.yaml"
    lines = run(config, "-o", out, code=1).splitlines()
    assert lines[0] == f"Error: {config} has no equivalent recipe:"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "  dtyp",
        "  models.2.parameters.weight",
        "  dtype",
    ]
    assert "did you mean 'dtype'?" in lines[1] and "--layers N" in lines[2]
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not valid"), ("3", "it holds no keys"), (None, "No such file")],
)
def test_a_file_that_is_no_configuration(text, message, tmp_path):
    file = tmp_path / "mergekit.yml"
    if text is not None:
        file.write_text(text)
    output = run(file, code=1)
    assert message in output and output.count("\n") == 1
