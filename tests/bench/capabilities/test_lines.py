"""Both lines: checkpoints as published, experts that share the vision side, every method."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from omnimerge.bench import cost, results, runner
from omnimerge.bench.analysis import read_analysis
from omnimerge.bench.capabilities import models, training
from omnimerge.bench.capabilities.line import INTERNVL, QWEN2VL, Merged
from omnimerge.bench.capabilities.presets import PRESETS
from omnimerge.bench.line import BenchError
from omnimerge.checkpoint import Checkpoint
from omnimerge.cli import main
from omnimerge.errors import GenerationError
from omnimerge.methods import all_methods


def weights(folder):
    return load_file(folder / "model.safetensors")


def stored(folder):
    tensors = Checkpoint.open(str(folder)).tensors.items()
    return {name: (meta.dtype, meta.shape) for name, meta in tensors}


def described(folder):
    """All that decides whether a merge can be loaded: how tensors are stored, and other files."""
    own = {"merge_manifest.json", "README.md", "model.safetensors"}
    others = [file for file in folder.rglob("*") if file.is_file() and file.name not in own]
    return stored(folder), {str(f.relative_to(folder)): f.read_bytes() for f in others}


def mark_built(folder, line, preset="quick"):
    built = results.Build(
        line=line.name, preset=preset, seed=0, seconds=1.0, environment=results.environment(["x"])
    )
    results.write(built, folder / results.BUILD_NAME)


def test_internvl_has_the_published_names(internvl):
    names = set(weights(internvl / "base"))

    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert {"language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"} <= names
    assert any(name.startswith("vision_tower.encoder.layer.0.") for name in names)
    assert not any(name.startswith("model.") for name in names)


def test_qwen2vl_has_the_published_names(qwen2vl):
    names = set(weights(qwen2vl / "base"))

    assert {"model.layers.0.self_attn.q_proj.weight", "lm_head.weight"} <= names
    assert "visual.blocks.0.attn.qkv.weight" in names


def test_full_experts_change_the_layers_of_the_language_model_alone(internvl):
    base, expert = weights(internvl / "base"), weights(internvl / "ocr")

    changed = {name for name in base if not torch.equal(base[name], expert[name])}

    assert changed == {name for name in base if name.startswith("language_model.model.layers.")}


def test_lora_experts_are_peft_adapters(qwen2vl, tiny):
    config = json.loads((qwen2vl / "ocr" / "adapter_config.json").read_text())

    assert config["r"] == tiny.rank
    assert (qwen2vl / "ocr" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("expert", ["ocr", "vqa"])
def test_same_seed_same_bytes(internvl, tiny, tmp_path, expert):
    shutil.copytree(internvl / "base", tmp_path / "base")

    training.build_expert(models.INTERNVL, tmp_path, tiny, expert, 0)

    written = (tmp_path / expert / "model.safetensors").read_bytes()
    assert written == (internvl / expert / "model.safetensors").read_bytes()


def test_same_seed_same_adapter(qwen2vl, tiny, tmp_path):
    shutil.copytree(qwen2vl / "base", tmp_path / "base")

    training.build_adapter(models.QWEN2VL, tmp_path, tiny, "chart", 0)

    written = (tmp_path / "chart" / "adapter_model.safetensors").read_bytes()
    assert written == (qwen2vl / "chart" / "adapter_model.safetensors").read_bytes()


def test_unknown_model_of_a_line_is_refused(internvl):
    with pytest.raises(BenchError, match="internvl has no model 'audio'"):
        INTERNVL.alone(internvl, "audio", "val")


@pytest.mark.parametrize("line", [INTERNVL, QWEN2VL], ids=lambda line: line.name)
def test_every_method_has_numbers_or_a_reason_and_loads(line, request, monkeypatch):
    def measure(line, recipe, out):  # here, and once: the fresh process has a test of its own
        line.write(recipe, out)
        return 1.0, None

    monkeypatch.setattr(runner, "measure", measure)
    load, loaded = type(line).check, []

    def check(line, out):  # the others have the same tensors and files, which is seen below
        if out.name in ("average", "optmerge"):
            load(line, out)
            loaded.append(out.name)

    monkeypatch.setattr(type(line), "check", check)
    folder = request.getfixturevalue(line.name)
    mark_built(folder, line)

    outcome = runner.run(
        line,
        folder,
        methods=list(all_methods()),
        scales=(1.0,),
        command=["x"],
        on_progress=lambda _: None,
        keep=True,
    )

    rows = {row.name: row for row in outcome.rows if row.kind in ("method", "refused")}
    assert set(rows) == set(all_methods())
    refused = {name: row.reason for name, row in rows.items() if row.kind == "refused"}
    single = {"arcee_fusion", "nearswap", "nuslerp", "passthrough", "slerp"}
    assert set(refused) == (single if line.lora else single | {"robustmerge"})
    assert refused["slerp"] == "merges 1 model; there are 5 experts"
    assert set(loaded) == {"average", "optmerge"}
    expected = described(folder / "merged" / "average")
    assert expected[0] == stored(folder / "base")
    for name, row in rows.items():
        if name in refused:
            continue
        assert set(row.scores) == set(line.columns)
        assert described(folder / "merged" / name) == expected


def test_time_and_memory_are_taken_in_a_fresh_process(internvl, tmp_path):
    recipe = INTERNVL.recipe(internvl, "ties", {"scale": 0.5})

    seconds, peak = cost.measure(INTERNVL, recipe, tmp_path / "out")

    INTERNVL.check(tmp_path / "out")
    assert 0 < seconds < 60
    assert peak is None or 1e6 < peak < 1e9


def test_a_merge_that_lacks_a_tensor_is_refused(internvl, tmp_path):
    shutil.copytree(internvl / "base", tmp_path / "out")
    tensors = weights(internvl / "base")
    del tensors["language_model.model.norm.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(GenerationError, match=r"model\.language_model\.norm\.weight|norm\.weight"):
        INTERNVL.check(tmp_path / "out")


def test_in_memory_is_what_is_on_disk(qwen2vl, tmp_path):
    recipe = QWEN2VL.recipe(qwen2vl, "optmerge", {"scale": 1.0})
    QWEN2VL.write(recipe, tmp_path / "out")
    (tmp_path / "prompts").symlink_to(qwen2vl / "prompts")
    subject = QWEN2VL.subject(qwen2vl)
    subject.put(recipe)

    assert subject.answers() == Merged(tmp_path, "out").answers()


@pytest.mark.parametrize(("line", "factor"), [(INTERNVL, 1.0), (QWEN2VL, 2.0)])
def test_experts_are_trained_again_from_the_base(
    line, factor, request, tmp_path, monkeypatch, tiny
):
    built = request.getfixturevalue(line.name)
    here = tmp_path / "seed-0"
    shutil.copytree(built, here)
    mark_built(here, line)
    monkeypatch.setitem(PRESETS[line.name], "quick", tiny)

    (tmp_path / "again").mkdir()
    line.trainer(here)(tmp_path / "again", factor)

    name = "adapter_model.safetensors" if line.lora else "model.safetensors"
    first, again = (load_file(folder / "ocr" / name) for folder in (here, tmp_path / "again"))
    same = all(torch.equal(first[key], again[key]) for key in first)
    assert same == (factor == 1.0)


def test_a_built_seed_is_analyzed_without_a_recipe(qwen2vl, tmp_path):
    here = tmp_path / "seed-0"
    shutil.copytree(qwen2vl, here)
    mark_built(here, QWEN2VL)

    result = CliRunner().invoke(main, ["bench", "analyze", str(here), "--no-ranks"])

    assert result.exit_code == 0, result.output
    found = read_analysis(here / "analysis.json")
    assert found.experts == QWEN2VL.experts
    assert found.tensors == 28  # seven matrices in each of four layers
