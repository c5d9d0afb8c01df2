"""What goes wrong gives one clear line, exit code 1, and no output folder."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from omnimerge.cli import main


@pytest.fixture
def recipe(checkpoints, tmp_path):
    """A recipe whose donor is a copy that may be damaged, in two shards with an index."""
    donor = tmp_path / "donor"
    shutil.copytree(checkpoints("llava_onevision"), donor)
    tensors = load_file(donor / "model.safetensors")
    (donor / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, donor / file)
    index = {"metadata": {}, "weight_map": files}
    (donor / "model.safetensors.index.json").write_text(json.dumps(index))
    return {
        "method": "adamms",
        "target": str(checkpoints("qwen2_vl")),
        "models": [str(donor)],
        "parameters": {"alpha": 0.3},
    }


def first(donor):
    return donor / "model-00001-of-00002.safetensors"


def test_what_cannot_be_printed_is_one_line(recipe, tmp_path):
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe))
    for arguments in (["merge", file, "-o", out], ["plan", file, "--json"]):
        with open("/dev/full", "w") as full:  # noqa: PTH123
            done = subprocess.run(
                [sys.executable, "-m", "omnimerge", *map(str, arguments)],
                stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        last = done.stderr.splitlines()[-1]
        assert (done.returncode, last) == (1, "Error: cannot print: No space left on device")
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert (out / "merge_manifest.json").is_file()


def test_options_of_a_deep_look_are_for_it(tmp_path):
    done = CliRunner().invoke(main, ["verify", str(tmp_path), "--tensors", "3"])
    assert done.exit_code == 2 and "--tensors is for --deep" in done.output


def cut(count):
    """Cut bytes off a shard; with a negative count, leave so many."""

    def damage(donor):
        size = first(donor).stat().st_size
        os.truncate(first(donor), size - count if count >= 0 else -count)

    return damage


def ghost(donor):
    file = donor / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["ghost.weight"] = first(donor).name
    file.write_text(json.dumps(index))


def nan(donor):
    tensors = load_file(first(donor))
    name = next(n for n in tensors if "language_model.model.layers" in n)
    tensors[name].flatten()[1] = math.nan
    save_file(tensors, first(donor))


DAMAGE = {
    "a shard is missing": (lambda d: first(d).unlink(), "which is missing; download it too"),
    "the index is missing": (lambda d: (d / "model.safetensors.index.json").unlink(), "no model."),
    "a shard is truncated": (cut(10), "is truncated"),
    "a shard lacks 1,000 bytes": (cut(1000), "is truncated"),
    "a shard ends within its header": (cut(-100), "is truncated"),
    "a shard ends within the length of its header": (cut(-5), "is truncated"),
    "a shard is empty": (lambda d: first(d).write_bytes(b""), "is truncated"),
    "the index names a missing tensor": (ghost, "places tensor 'ghost.weight' in"),
    "an input holds NaN": (nan, "holds NaN or infinity"),
    "the config is missing": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "the folder is missing": (shutil.rmtree, "there is no folder"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_input(what, recipe, tmp_path):
    damage, message = DAMAGE[what]
    damage(tmp_path / "donor")
    assert_refused(recipe, tmp_path, message)


KEYS = ("method", "target", "models", "parameters", "select", "overrides", "vocabulary", "dtype")


@pytest.mark.parametrize("key", [*KEYS, "base", "max_shard_size", "seed"])
def test_a_typo_in_any_key(key, recipe, tmp_path):
    wrong = key[:-1] + key[-1] * 2
    changed = {k: v for k, v in recipe.items() if k != key} | {wrong: recipe.get(key, 1)}
    assert_refused(changed, tmp_path, f"{wrong}: unknown key, did you mean '{key}'?")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"models": "donor"}, "models:"),
        ({"models": 3}, "models:"),
        ({"models": [3]}, "models.0:"),
        ({"models": [None]}, "models.0:"),
        ({"parameters": 3}, "parameters:"),
        ({"parameters": [1]}, "parameters:"),
        ({"overrides": {}}, "overrides"),
        ({"overrides": [3]}, "overrides.0:"),
        ({"method": 3}, "method:"),
        ({"target": ["x"]}, "target:"),
        ({3: 4}, "3: Keys should be strings"),
    ],
    ids=str,
)
def test_wrong_types(changed, message, recipe, tmp_path):
    assert_refused({**recipe, **changed}, tmp_path, message)


def test_an_output_below_a_file(recipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(recipe, tmp_path, "file", out=tmp_path / "file" / "out")
    assert_refused(recipe, tmp_path, "is no folder", out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fails_anywhere(recipe, tmp_path, monkeypatch):
    real, failing = os.stat, str(Path(recipe["target"]) / "tokenizer.json")

    def stat(path, *arguments, **options):
        if str(path) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert_refused(recipe, tmp_path, f"{failing}: Input/output error")


def assert_refused(recipe, tmp_path, message, out=None):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    out = out or tmp_path / "out"
    existed = out.exists()
    result = CliRunner().invoke(main, ["merge", str(file), "-o", str(out)])
    assert result.exit_code == 1, result.output + repr(result.exception)
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert message in result.output
    assert out.exists() is existed
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
