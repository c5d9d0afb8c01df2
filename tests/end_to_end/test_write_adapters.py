"""Adapters that omnimerge writes: PEFT loads them, and they are what the merge or the model is."""

import json
import os
import shutil
import warnings

import peft
import pytest
import tiny_adapters
import tiny_models
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import omnimerge
from omnimerge.arch import memory_names
from omnimerge.checkpoint import Checkpoint
from omnimerge.cli import main
from omnimerge.engine import adapter
from omnimerge.errors import InputChangedError, OutputError
from omnimerge.methods import LowRank, truncate


def load_with_peft(name, base, folder):
    """The base with the adapter merged by PEFT; every tensor of the adapter has to be used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_models.load(name, base)
        adapted = peft.PeftModel.from_pretrained(model, folder)
        loaded = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    stored = omnimerge.checkpoint.Adapter.open(folder).store
    # PEFT lists no base_layer biases here; it does load them, as the comparison shows.
    assert {n for n in stored.tensors if "base_layer" not in n} <= set(loaded)
    return adapted.merge_and_unload().state_dict()


def assert_same(state, checkpoint, rtol=1e-5):
    names = memory_names(checkpoint, list(state))
    assert len(names) >= len(checkpoint.tensors) > 20
    for disk, memory in names.items():
        found, expected = state[memory].float(), checkpoint.read_tensor(disk).float()
        assert (found - expected).norm() <= rtol * expected.norm() + 1e-6, disk


@pytest.fixture(scope="module")
def experts(checkpoints, tmp_path_factory):
    """A base and two adapters of rank 3 on it."""
    root = tmp_path_factory.mktemp("adapters")
    base = checkpoints("qwen2_vl", own="base")
    for number in range(2):
        model = tiny_models.load("qwen2_vl", base)
        tiny_adapters.save(model, root / f"{number}", seed=number, size=0.2, r=3)
    return base, [root / "0", root / "1"]


@pytest.mark.parametrize("method", ["task_arithmetic", "optmerge", "tsv", "ties", "wudi"])
def test_a_merge_as_an_adapter_is_the_merge(method, experts, tmp_path):
    base, adapters = experts
    recipe = {
        "method": method, "base": str(base), "models": [{"adapter": str(a)} for a in adapters],
        "parameters": {"iterations": 20} if method == "wudi" else {},
    }  # fmt: skip
    omnimerge.merge(recipe, tmp_path / "full")
    summary = omnimerge.merge_as_adapter(recipe, tmp_path / "lora", 32)
    assert min(summary.energy.values()) > 0.999999
    merged = load_with_peft("qwen2_vl", base, tmp_path / "lora")
    assert_same(merged, Checkpoint.open(tmp_path / "full"))
    low = method in ("task_arithmetic", "optmerge", "tsv")
    assert max(summary.ranks.values()) == (6 if low else 32)
    # It is an expert again.
    again = {"method": "task_arithmetic", "base": str(base), "models": [
        {"adapter": str(tmp_path / "lora")}]}  # fmt: skip
    omnimerge.merge(again, tmp_path / "again")
    assert_same(merged, Checkpoint.open(tmp_path / "again"))


def test_a_lower_rank_keeps_the_best_part(experts, tmp_path):
    base, adapters = experts
    recipe = {
        "method": "task_arithmetic", "base": str(base), "parameters": {"scale": 0.5},
        "models": [{"adapter": str(a)} for a in adapters],
    }  # fmt: skip
    omnimerge.merge(recipe, tmp_path / "full")
    summary = omnimerge.merge_as_adapter(recipe, tmp_path / "lora", 2)
    name = "model.layers.1.mlp.up_proj.weight"
    origin, full = (Checkpoint.open(f).read_tensor(name) for f in (base, tmp_path / "full"))
    u, s, vt = torch.linalg.svd(full - origin)
    module = "model.language_model.layers.1.mlp.up_proj"
    merged = load_with_peft("qwen2_vl", base, tmp_path / "lora")
    best = origin + (u[:, :2] * s[:2]) @ vt[:2]
    torch.testing.assert_close(merged[f"{module}.weight"], best, rtol=1e-4, atol=1e-5)
    assert summary.energy[module] == pytest.approx(float(s[:2].square().sum() / s.square().sum()))


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "qwen2"])
def test_an_extracted_adapter_is_the_model(name, checkpoints, tmp_path):
    """Everything changes: matrices, embedding, convolution, norms and biases."""
    base = checkpoints(name, own="base")
    tuned = tiny_models.load(name, base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * 0.02 * (parameter.abs().mean() + 0.01))
    tiny_models.save(tuned, tmp_path / "model")
    select = "language_model" if name == "llava_onevision" else "all"  # class_embedding, no module
    summary = omnimerge.extract_adapter(
        base, tmp_path / "model", tmp_path / "lora", energy=1.0, select=select
    )
    merged = load_with_peft(name, base, tmp_path / "lora")
    expected = omnimerge.merge(
        {"method": "passthrough", "target": str(base), "models": [str(tmp_path / "model")],
         "select": select}, tmp_path / "expected",
    )  # fmt: skip
    assert_same(merged, Checkpoint.open(tmp_path / "expected"))
    assert len(summary.ranks) + len(summary.whole) >= 20
    assert len(expected.merged) >= 20


def test_the_rank_follows_from_the_energy(checkpoints, tmp_path):
    base = checkpoints("qwen2_vl", own="base")
    model = checkpoints("qwen2_vl", own="expert0")
    arguments = ["extract-adapter", str(base), str(model), "--select", "linear"]
    run = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "a"), "--energy", "0.9"])
    assert run.exit_code == 0, run.output
    assert "14  matrices of rank" in run.output
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"`{base}`, the difference of `{model}` and it, written\nwith [omnimerge]" in card
    assert "library_name: peft" in card and "energy: 0.9\n```" in card
    adapter = omnimerge.checkpoint.Adapter.open(tmp_path / "a")
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = (Checkpoint.open(f).read_tensor(name) for f in (base, model))
    held = torch.linalg.svdvals((b - a).double()).square().cumsum(0)
    rank = int((held / held[-1] < 0.9).sum()) + 1
    change = adapter.changes["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert adapter.store.meta(change.a).shape == (rank, 32)
    both = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "b")])
    assert both.exit_code == 2 and "give either --rank or --energy" in both.output


def test_what_no_adapter_holds_is_refused(checkpoints, tmp_path):
    base = checkpoints("llava", own="base")
    tuned = tiny_models.load("llava", base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith("class_embedding"):
                parameter.add_(0.1)
    tiny_models.save(tuned, tmp_path / "model")
    with pytest.raises(
        OutputError, match=r"1 tensors changed that no LoRA adapter holds.*class_emb"
    ):
        omnimerge.extract_adapter(base, tmp_path / "model", tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="nothing changed"):
        omnimerge.extract_adapter(base, base, tmp_path / "out", rank=4)


def test_truncation_of_large_matrices_needs_no_dense_decomposition():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(600, 40, generator=generator) * 0.8 ** torch.arange(40)
    right = torch.randn(40, 700, generator=generator)
    exact = torch.linalg.svdvals((left @ right).double())
    total = exact.square().sum()
    for given in (left @ right, LowRank(left, right)):
        found, energy = truncate(given, rank=8)
        assert energy == pytest.approx(float(exact[:8].square().sum() / total), rel=1e-6)
        error = (found.dense() - left @ right).double().square().sum()
        assert float(error / total) == pytest.approx(1 - energy, abs=1e-6)
        found, energy = truncate(given, energy=0.99)
        wanted = int((exact.square().cumsum(0) / total < 0.99).sum()) + 1
        assert found.left.shape[1] == wanted and energy >= 0.99
    nothing, energy = truncate(torch.zeros(5, 4), rank=2)
    assert nothing.left.shape == (5, 0) and energy == 1.0


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_source_that_changes_during_a_merge_as_an_adapter(experts, tmp_path, file):
    base, adapters = experts
    shutil.copytree(adapters[0], tmp_path / "expert")
    recipe = {"method": "task_arithmetic", "base": str(base), "models": [
        {"adapter": str(tmp_path / "expert")}]}  # fmt: skip

    def change(*_):
        os.utime(tmp_path / "expert" / file, (1, 1))

    with pytest.raises(InputChangedError, match=f"{file} changed while it was merged"):
        omnimerge.merge_as_adapter(recipe, tmp_path / "lora", 4, on_progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]


@pytest.mark.parametrize("which", ["base", "model"])
def test_a_source_that_changes_during_an_extraction(checkpoints, tmp_path, monkeypatch, which):
    for name in ("base", "model"):
        shutil.copytree(checkpoints("qwen2_vl", own=name), tmp_path / name)
    real = adapter.truncate

    def change(*arguments, **limits):
        os.utime(tmp_path / which / "model.safetensors", (1, 1))
        return real(*arguments, **limits)

    monkeypatch.setattr(adapter, "truncate", change)
    command = ["extract-adapter", str(tmp_path / "base"), str(tmp_path / "model")]
    command += ["-o", str(tmp_path / "lora"), "--rank", "2", "--select", "linear"]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    changed = tmp_path / which / "model.safetensors"
    assert f"{changed} changed while it was read (modified_ns); extract again when" in line
    assert not (tmp_path / "lora").exists()


@pytest.fixture(params=["merge", "extract"])
def written(request, experts, checkpoints, tmp_path):
    """An adapter of each of the two commands."""
    base, adapters = experts
    if request.param == "merge":
        recipe = {
            "method": "task_arithmetic", "base": str(base),
            "models": [{"adapter": str(a)} for a in adapters],
        }  # fmt: skip
        omnimerge.merge_as_adapter(recipe, tmp_path / "lora", 4)
    else:
        recipe = {"method": "task_arithmetic", "base": str(base), "models": [
            {"adapter": str(adapters[0])}]}  # fmt: skip
        omnimerge.merge(recipe, tmp_path / "model")
        omnimerge.extract_adapter(base, tmp_path / "model", tmp_path / "lora", rank=4)
    return tmp_path / "lora"


def failures(folder):
    return {c.name: c.details for c in omnimerge.verify(folder) if c.state == "failed"}


def test_verify_passes(written):
    checks = omnimerge.verify(written, deep=True)
    assert [check.state for check in checks] == ["ok", "ok", "ok", "skipped"]
    described = json.loads((written / "merge_manifest.json").read_text())
    assert described["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    done = CliRunner().invoke(main, ["verify", str(written)])
    assert done.exit_code == 0 and done.output.endswith("all 3 checks passed\n")


def test_verify_finds_what_was_changed(written):
    file = written / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "lora_A" in key)
    other = next(key for key in tensors if "lora_B" in key)
    tensors[other][0, 0] = float("nan")
    tensors[name] = tensors[name].half()
    save_file(tensors, file)
    (written / "adapter_model.bin").write_bytes(b"x")
    shape = list(tensors[name].shape)
    assert failures(written) == {
        "checksums of the files": (
            "adapter_model.bin was added: the manifest does not name it",
            "adapter_model.safetensors is not what was written",
        ),
        "names, shapes and dtypes": (f"tensor {name!r} is F16 {shape} instead of F32 {shape}",),
        "finite numbers": (f"tensor {other!r} holds NaN or infinity",),
    }


def test_verify_finds_another_rank(written):
    file = written / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "r": 7, "rank_pattern": {}}))
    found = failures(written)
    assert found["checksums of the files"] == ("adapter_config.json is not what was written",)
    assert "its config says 7" in found["names, shapes and dtypes"][0]


def test_verify_of_an_adapter_with_an_older_manifest(written):
    file = written / "merge_manifest.json"
    described = json.loads(file.read_text())
    del described["files"], described["tensors"]
    file.write_text(json.dumps(described))
    states = [check.state for check in omnimerge.verify(written)]
    assert states == ["skipped", "skipped", "ok"]
