"""PEFT adapters: read as PEFT merges them, for every option, and refused where they cannot be."""

import json
import shutil

import pytest
import tiny_adapters
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

from omnimerge.arch import memory_names
from omnimerge.checkpoint import AdaptedCheckpoint, Adapter, Checkpoint
from omnimerge.engine.planning import adapted
from omnimerge.errors import CheckpointError

EVERYTHING = [*tiny_adapters.ALL_LINEAR, "qkv", "attn.proj", "fc1", "mlp.2"]

OPTIONS = {
    "plain": {"lora_alpha": 16},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 3},
        "alpha_pattern": {"v_proj": 16, r"layers.1.mlp.(up|gate)_proj": 5},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"k_proj": 2}},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "some modules": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "embeddings with dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "vision tower": {"target_modules": EVERYTHING},
    "convolution": {"target_modules": ["patch_embed.proj", "q_proj"]},
    "convolution with dora": {"target_modules": ["patch_embed.proj"], "use_dora": True},
    "biases of all": {"bias": "all"},
    "biases of the adapted": {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
    "bias of B": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
}


def assert_equals_peft(checkpoint, merged, names):
    for name in checkpoint.tensors:
        expected = merged[names[name]].float()
        found = checkpoint.read_tensor(name).float()
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_tensors_are_those_that_peft_merges(name, checkpoints, tmp_path):
    folder = checkpoints("qwen2_vl", own="base")
    model = tiny_models.load("qwen2_vl", folder)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    merged = tiny_adapters.save(model, tmp_path, **OPTIONS[name])
    base = Checkpoint.open(folder)
    checkpoint = adapted(base, tmp_path)
    names = memory_names(base, list(merged))
    assert_equals_peft(checkpoint, merged, names)
    changed = {n for n in names if not torch.equal(before[names[n]], merged[names[n]])}
    assert changed == {n for n in names if checkpoint.factors(n) is None or rank(checkpoint, n)}
    assert changed

    for tensor in changed:
        factors = checkpoint.factors(tensor)
        if factors is not None:
            delta = (factors[0] @ factors[1]).reshape(checkpoint.meta(tensor).shape)
            expected = merged[names[tensor]] - before[names[tensor]]
            torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-6)
        whole = checkpoint.read(tensor)
        part = slice(7, min(30, len(whole)))
        torch.testing.assert_close(checkpoint.read(tensor, part.start, part.stop), whole[part])


def rank(checkpoint, name):
    return checkpoint.factors(name)[0].shape[1]


def test_adapters_in_bfloat16_and_as_pickle(checkpoints, tmp_path):
    folder = checkpoints("qwen2_vl", own="base")
    model = tiny_models.load("qwen2_vl", folder)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tiny_adapters.save(model, tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.language_model.layers.1.mlp.down_proj.lora_{}.weight"
    a, b = (tensors[key.format(x)].float() for x in "AB")
    assert tensors[key.format("A")].dtype == torch.bfloat16
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()

    checkpoint = adapted(Checkpoint.open(folder), tmp_path)
    found = checkpoint.read_tensor("model.layers.1.mlp.down_proj.weight")
    expected = before["model.language_model.layers.1.mlp.down_proj.weight"] + b @ a * 2  # 8 / 4
    torch.testing.assert_close(found, expected)


def test_weights_stored_as_in_by_out(tmp_path):
    """GPT-2's Conv1D: `fan_in_fan_out`, plain and with DoRA."""
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    for dora in (False, True):
        model = transformers.GPT2LMHeadModel(config)
        base_folder, folder = tmp_path / f"base{dora}", tmp_path / f"lora{dora}"
        model.save_pretrained(base_folder)
        options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": dora}
        merged = tiny_adapters.save(model, folder, **options)
        base, adapter = Checkpoint.open(base_folder), Adapter.open(folder)
        checkpoint = AdaptedCheckpoint(base, adapter, {name: name for name in adapter.changes})
        assert set(adapter.changes) == {
            f"transformer.h.0.{module}.weight" for module in ("attn.c_attn", "mlp.c_fc")
        }
        assert_equals_peft(checkpoint, merged, {name: name for name in base.tensors})


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("module", ["embed_tokens", "down_proj"])
def test_little_is_read_for_a_slice(module, options, checkpoints, tmp_path, monkeypatch):
    """Neither whole factors for every slice, nor the whole matrix at once for DoRA's norms."""
    monkeypatch.setattr("omnimerge.checkpoint.adapted._BLOCK", 256)
    folder = checkpoints("qwen2", own="base")
    tiny_adapters.save(
        tiny_models.load("qwen2", folder), tmp_path, target_modules=[module], **options
    )
    inside = "layers.0.mlp." if module == "down_proj" else ""
    name = f"model.{inside}{module}.weight"
    checkpoint = adapted(Checkpoint.open(folder), tmp_path)
    read, sizes = Checkpoint.read_into, []

    def note(self, buffer, *where):
        sizes.append((self is checkpoint.base, buffer.numel()))
        read(self, buffer, *where)

    monkeypatch.setattr(Checkpoint, "read_into", note)
    whole = checkpoint.read(name)
    sizes.clear()
    step = 256
    parts = [checkpoint.read(name, n, n + step) for n in range(0, len(whole), step)]
    assert torch.equal(torch.cat(parts), whole)
    rank, columns = 4, checkpoint.meta(name).shape[1]
    # of the left factor the rows that are needed; the right one, and the gains, are kept
    changed = rank * len(whole) // columns
    if module == "embed_tokens":  # PEFT saves the layer under it too
        changed += len(whole)
    assert sum(n for base, n in sizes if not base) == changed
    assert max(n for _, n in sizes) <= step
    again = adapted(Checkpoint.open(folder), tmp_path)
    sizes.clear()
    torch.testing.assert_close(again.read(name, 0, step), parts[0], rtol=0, atol=0)
    assert max(n for _, n in sizes) <= max(step, rank * columns)
    assert again.memory_of(name) >= 4 * step
    assert again.memory_of("model.norm.weight") == 0


@pytest.mark.parametrize("naming", ["published", "v5"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen2", "llava"])
def test_adapters_of_other_architectures(name, naming, checkpoints, tmp_path):
    folder = checkpoints(name, naming=naming)
    merged = tiny_adapters.save(tiny_models.load(name, folder), tmp_path)
    base = Checkpoint.open(folder)
    names = memory_names(base, list(merged))
    checkpoint = adapted(base, tmp_path)
    assert_equals_peft(checkpoint, merged, names)
    assert sum(meta.dtype == "F32" and rank(checkpoint, n) > 0
               for n, meta in checkpoint.tensors.items()) >= 14  # fmt: skip


@pytest.fixture
def adapter(checkpoints, tmp_path):
    folder = checkpoints("qwen2_vl", own="base")
    tiny_adapters.save(tiny_models.load("qwen2_vl", folder), tmp_path / "adapter")
    return folder, tmp_path / "adapter"


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({n: t.clone() for n, t in tensors.items()}, file)


FIRST = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter; only LORA can be merged"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which alters the base's weights"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens set, which cannot be merged"),
        ({"layer_replication": [[0, 1]]}, "it adds layers"),
        ({"r": 8}, "have rank 4, its config says 8"),
        ({"bias": "some"}, "bias 'some', which is not known"),
    ],
)
def test_configs_that_cannot_be_merged(adapter, changes, message):
    change_config(adapter[1], **changes)
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(adapter[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST.format("A")), "lacks a factor of .*down_proj.weight"),
        (lambda t: t.update({"x.lora_E": torch.ones(1)}), "'x.lora_E', of a kind that is not"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)  # fmt: skip
def test_weights_that_are_not_known(adapter, change, message):
    change_tensors(adapter[1], change)
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(adapter[1])


def test_adapters_of_other_models_are_refused(adapter, checkpoints):
    folder, lora = adapter
    wide = Checkpoint.open(checkpoints("qwen2_vl", intermediate_size=80))
    with pytest.raises(CheckpointError, match=r"do not make the base's .* for another model"):
        adapted(wide, lora)
    change_tensors(
        lora, lambda t: t.update({k.replace("layers.1", "layers.7"): v for k, v in t.items()})
    )
    with pytest.raises(CheckpointError, match=r"changes 7 parameters that the base does not have"):
        adapted(Checkpoint.open(folder), lora)


def test_missing_files(adapter, tmp_path):
    folder, lora = adapter
    with pytest.raises(
        CheckpointError, match=r"has no adapter_config.json; is it a PEFT adapter's"
    ):
        Adapter.open(folder)
    with pytest.raises(CheckpointError, match="is a PEFT adapter; give it as `adapter: "):
        Checkpoint.open(lora)
    shutil.copytree(lora, tmp_path / "empty")
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither adapter_model.safetensors nor"):
        Adapter.open(tmp_path / "empty")
