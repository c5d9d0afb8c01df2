"""The command line, through the same entry point a user has."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import omnimerge
from omnimerge.checkpoint import Checkpoint
from omnimerge.cli import main
from omnimerge.methods import all_methods


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


@pytest.fixture
def pair(checkpoints):
    return checkpoints("qwen2_vl"), checkpoints("llava_onevision")


@pytest.fixture
def recipe(pair, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"method: adamms\ntarget: {pair[0]}\nmodels: [{pair[1]}]\nparameters: {{alpha: 0.3}}\n"
    )
    return file


def test_inspect(pair):
    found = json.loads(run("inspect", pair[1], "--json").output)
    assert found["model_type"] == "llava_onevision"
    assert found["layout"] == "hf_nested"
    assert found["llm"]["hidden_size"] == 32 and found["llm"]["kv_heads"] == 2
    assert found["llm"]["tied"] is False and found["llm"]["vocab_size"] == 96
    assert set(found["components"]) == {"llm", "vision", "projector"}
    checkpoint = Checkpoint.open(pair[1])
    assert found["tensors"] == len(checkpoint.tensors)
    assert found["parameters"] == sum(m.numel for m in checkpoint.tensors.values())
    assert sum(c["bytes"] for c in found["components"].values()) == found["bytes"]
    text = run("inspect", pair[1]).output
    assert "llava_onevision" in text and "hidden_size 32" in text


def test_inspect_of_an_unknown_layout_still_shows_what_there_is(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"blocks.0.w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = json.loads(run("inspect", tmp_path, "--json").output)
    assert found["layout"] is None and "fit no known layout" in found["note"]
    assert found["components"]["other"]["parameters"] == 2


def test_map(pair):
    found = json.loads(run("map", *pair, "--json").output)
    assert set(found) >= {"mergeable", "reasons", "merged", "kept", "unused", "ancestor"}
    assert found["mergeable"] is True and found["reasons"] == []
    assert set(found["merged"][0]) == {
        "target", "sources", "source_slots", "slot", "op", "rule",
    }  # fmt: skip
    assert set(found["ancestor"]) == {"cosine_median", "cosine_min", "sampled"}
    assert found["ancestor"]["sampled"] == 14
    assert "mergeable: yes" in run("map", *pair).output


def test_map_says_why_not(pair, checkpoints):
    foreign = checkpoints("llava_onevision", ancestor="foreign")
    found = json.loads(run("map", pair[0], foreign, "--json").output)
    assert found["mergeable"] is False and "share no ancestor" in found["reasons"][0]
    assert "mergeable: no, the language models share no" in run("map", pair[0], foreign).output
    forced = run("map", pair[0], foreign, "--force", "ancestor", "--json").output
    assert json.loads(forced)["mergeable"] is True


def test_plan(recipe, pair):
    found = json.loads(run("plan", recipe, "--json").output)
    assert found["tensors"]["merged"] == 27
    assert found["bytes_to_write"] == Checkpoint.open(pair[0]).total_bytes()
    assert found["peak_memory"] > 0
    assert "reads" in run("plan", recipe).output


def test_merge_from_a_file_and_from_options_is_the_same(recipe, pair, tmp_path):
    said = run("merge", recipe, "-o", tmp_path / "a").output
    assert "merged 27 tensors, kept" in said
    options = ["--method", "adamms", "--target", pair[0], "--model", pair[1]]
    run("merge", *options, "--param", "alpha=0.3", "-o", tmp_path / "b")
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert a == b
    run("merge", recipe, "--param", "alpha=0.0", "-o", tmp_path / "c")
    assert (tmp_path / "c" / "model.safetensors").read_bytes() != a
    run("merge", recipe, "-o", tmp_path / "a", code=1)
    run("merge", recipe, "-o", tmp_path / "a", "--overwrite")


def test_methods():
    listed = run("methods").output
    assert all(f"  {name} " in listed for name in all_methods())
    one = run("methods", "linear").output
    assert "weights (per model) in [-10, 10], default 1 each" in one
    assert "normalize (global), default true" in one
    assert {m["name"] for m in json.loads(run("methods", "--json").output)} == set(all_methods())
    wrong = run("methods", "lineer", code=1)
    assert "did you mean 'linear'?" in wrong.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mrege"], 2, "did you mean 'merge'?"),
        (["bench", "buld"], 2, "did you mean 'build'?"),
        (["merge", "-o", "x"], 2, "give a recipe file, or --method"),
        (["merge", "--method", "adams", "-o", "x"], 2, "did you mean 'adamms'?"),
        (["merge", "none.yaml", "-o", "x"], 1, "none.yaml is not valid: cannot be read"),
        (["inspect", "./none"], 1, "there is no folder ./none"),
        (["map", "./none", "./none"], 1, "there is no folder ./none"),
        (["zoo", "path", "mini-lm"], 1, "did you mean 'mini-llm'?"),
        (["plan", "--method", "linear", "--model", "./x", "--param", "a"], 2, "write name=value"),
        (["search", "r.yaml", "-o", "x"], 2, "--prompts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_gives_one_line(arguments, code, message):
    result = run(*arguments, code=code)
    assert message in result.output
    assert code == 2 or result.output.count("\n") == 1
    assert not Path("x").exists()


def test_a_typo_in_a_recipe_writes_nothing(recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("parameters", "paramters"))
    result = run("merge", recipe, "-o", tmp_path / "out", code=1)
    assert "paramters: unknown key, did you mean 'parameters'?" in result.output
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom omnimerge.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "loaded = {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0  # 0.12 s on an idle machine; the bound leaves room for a busy one


def test_a_merge_does_not_import_transformers(recipe, tmp_path):
    code = (
        "import sys\nfrom omnimerge.cli import main\n"
        f"arguments = ['merge', {str(recipe)!r}, '-o', {str(tmp_path / 'out')!r}]\n"
        "main(arguments, standalone_mode=False)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_command_has_help_with_an_example():
    for name in ("inspect", "map", "plan", "merge", "search", "methods"):
        assert "omnimerge" in run(name, "--help").output or "recipe" in run(name, "--help").output


def test_python_api():
    assert set(omnimerge.methods()) == set(all_methods())
    assert callable(omnimerge.search)
    assert omnimerge.methods.linear is not None
    for name in omnimerge.__all__:
        assert getattr(omnimerge, name) is not None
    with pytest.raises(AttributeError):
        _ = omnimerge.nothing


def test_the_module_runs(tmp_path):
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "omnimerge", "--version"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert done.stdout.strip() == omnimerge.__version__


def test_map_shows_slots_differences_and_parts(pair):
    output = run("map", *pair).output
    assert "language model" in output and "attn.q.weight" in output
    assert "mlp.down.weight" in output and "they differ in" in output
    assert "language_model.model.layers.{i}.* becomes model.layers.{i}.*" in output
    assert "Vision tower" in output and "mergeable: yes" in output


def test_layout_of_a_known_checkpoint_is_a_file(pair, tmp_path):
    from omnimerge.arch import layouts, read_layouts

    file = tmp_path / "plain.yaml"
    assert f"layout -> {file}" in run("layout", pair[0], "-o", file).output
    (found,) = read_layouts(file)
    assert found == next(layout for layout in layouts() if layout.name == "plain")


def test_layout_is_inferred_with_a_sibling(pair):
    alone = run("layout", pair[1], "--infer").output
    assert "self_attn.q_proj: attn.q" in alone and "language_model.model." in alone
    told = run("layout", pair[1], "--infer", "--like", pair[0]).output
    assert "Compared with" in told and "UNDECIDED" not in told


def test_layout_files_that_are_wrong_end_in_one_line(pair, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("prefix: model.\nhead: lm_head\n")
    for words in (("inspect", pair[0]), ("map", *pair)):
        result = run(*words, "--layout", file, code=1)
        assert result.stderr == f"Error: layout {file}: 'block' is missing\n"
    missing = run("layout", pair[0], "--layout", tmp_path / "none.yaml", code=1)
    assert "No such file" in missing.stderr
    nowhere = run("layout", pair[0], "-o", tmp_path / "no" / "file.yaml", code=1)
    assert nowhere.stderr.startswith("Error: cannot write")
