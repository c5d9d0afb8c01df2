"""The AdaMMS paper's main pair at its real size: sparse files with real headers, no data."""

import json
import time
from pathlib import Path

import pytest
import torch
import transformers as T

import omnimerge
from omnimerge.checkpoint.dtypes import dtype_name
from omnimerge.checkpoint.shard import OutputTensor, shard_by_size
from omnimerge.checkpoint.writer import CheckpointWriter

QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}


def sparse(folder: Path, model, renames: dict[str, str], monkeypatch) -> Path:
    """Write the headers of a model on the meta device; the data are holes."""
    from omnimerge.checkpoint import shard

    tensors = []
    for name, tensor in model.state_dict().items():
        for before, after in renames.items():
            if name.startswith(before):
                name = after + name[len(before) :]
                break
        tensors.append(OutputTensor(name, dtype_name(torch.bfloat16), tuple(tensor.shape)))
    monkeypatch.setattr(shard, "_reserve", lambda fd, size: shard.os.ftruncate(fd, size))
    with CheckpointWriter(folder, shard_by_size(tensors, 5 * 10**9)) as out:
        (out.folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    monkeypatch.undo()
    return folder


@pytest.fixture
def pair(tmp_path, monkeypatch):
    with torch.device("meta"):
        mrope = {**ROPE, "mrope_section": [16, 24, 24]}
        qwen = T.Qwen2VLForConditionalGeneration(
            T.Qwen2VLConfig(
                text_config={**QWEN2_7B, "vocab_size": 152064, "rope_parameters": mrope},
                vision_config={"hidden_size": 3584},
            )
        )
        text = T.Qwen2Config(**QWEN2_7B, vocab_size=152000, rope_parameters=ROPE)
        onevision = T.LlavaOnevisionForConditionalGeneration(
            T.LlavaOnevisionConfig(text_config=text)
        )
    target = sparse(
        tmp_path / "qwen2-vl",
        qwen,
        {"model.language_model.": "model.", "model.visual.": "visual."},
        monkeypatch,
    )
    donor = sparse(
        tmp_path / "llava-onevision",
        onevision,
        {
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.": "",
        },
        monkeypatch,
    )
    return target, donor


def test_the_main_pair_of_the_paper(pair):
    target, donor = pair
    start = time.perf_counter()
    summary = omnimerge.inspect(target)
    assert time.perf_counter() - start < 1
    assert summary["layout"] == "plain"
    assert 16e9 < summary["bytes"] < 17e9
    assert summary["components"]["llm"]["parameters"] == 7_615_616_512  # Qwen2-7B, as published
    assert summary["llm"]["kv_heads"] == 4 and summary["llm"]["head_dim"] == 128

    start = time.perf_counter()
    plan = omnimerge.plan(
        {
            "method": "adamms",
            "target": str(target),
            "models": [str(donor)],
            "parameters": {"alpha": 0.1},
        }
    )
    assert time.perf_counter() - start < 2
    # 28 layers of 7 matrices, 3 biases and 2 norms, and the final norm; embedding and head stay,
    # as the paper says, since the vocabularies differ.
    assert len(plan.merged) == 28 * 12 + 1
    assert plan.kept_reasons()["vocabularies differ: target 152,064 rows, donor 152,000"] == 2
    assert plan.peak_memory < 100e6
    assert plan.bytes_to_write == summary["bytes"]
    assert all(sum(t.nbytes for t in shard) <= 5e9 for shard in plan.shards)
    assert sum(f.stat().st_blocks for f in target.iterdir()) * 512 < 10e6  # the files are sparse


def test_mapping_an_index_of_70b(tmp_path, monkeypatch):
    """Headers of a 72B pair: 1,360 tensors against 1,027, in 31 and 30 files; fused on one side."""
    from omnimerge.checkpoint import shard

    hidden, mlp, heads, kv_heads, layers, vocab = 8192, 29568, 64, 8, 80, 152064
    kv = kv_heads * 128

    def saved(folder, block, extra, config):
        shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
        shapes["lm_head.weight"] = (vocab, hidden)
        for i in range(layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
        shapes |= extra
        tensors = [OutputTensor(name, "BF16", shape) for name, shape in shapes.items()]
        with CheckpointWriter(folder, shard_by_size(tensors, 5 * 10**9)) as out:
            (out.folder / "config.json").write_text(json.dumps(config))
        return len(shapes)

    matrices = {"mlp.down_proj.weight": (hidden, mlp), "self_attn.o_proj.weight": (hidden, hidden)}
    matrices |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    split = {
        f"self_attn.{n}_proj.weight": (rows, hidden)
        for n, rows in (("q", hidden), ("k", kv), ("v", kv))
    }
    split |= {
        f"self_attn.{n}_proj.bias": (rows,) for n, rows in (("q", hidden), ("k", kv), ("v", kv))
    }
    split |= {"mlp.gate_proj.weight": (mlp, hidden), "mlp.up_proj.weight": (mlp, hidden)}
    fused = {"self_attn.qkv_proj.weight": (hidden + 2 * kv, hidden)}
    fused |= {"self_attn.qkv_proj.bias": (hidden + 2 * kv,)}
    fused |= {"mlp.gate_up_proj.weight": (2 * mlp, hidden)}
    tower = {f"visual.blocks.{i}.{name}": (1280,) for i in range(32) for name in "abcdefghijkl"}
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "rope_theta": 1e6}
    monkeypatch.setattr(shard, "_reserve", lambda fd, size: shard.os.ftruncate(fd, size))
    target, donor = tmp_path / "target", tmp_path / "donor"
    ours = saved(target, {**matrices, **split}, tower, config)
    theirs = saved(donor, {**matrices, **fused}, tower, config)
    monkeypatch.undo()
    assert ours + theirs > 1500
    assert len(list(target.glob("*.safetensors"))) == 31

    start = time.perf_counter()
    alignment = omnimerge.align(target, donor)
    elapsed = time.perf_counter() - start
    assert elapsed < 2, elapsed
    assert len(alignment.merged) == layers * 12 + 3
    assert {m.op for m in alignment.merged} == {"rename", "split"}
    (reason,) = alignment.reasons()  # data that are holes look like a download that broke off
    assert reason.startswith("all 560 sampled matrices are zero")
    assert alignment.ancestor.cosines == ()
    print(f"mapped in {elapsed:.2f} s")
