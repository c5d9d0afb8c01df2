"""The AdaMMS paper's main pair at its real size: sparse files with real headers, no data."""

import json
import time
from pathlib import Path

import pytest
import torch
import transformers as T

import omnimerge
from omnimerge.checkpoint.dtypes import dtype_name
from omnimerge.checkpoint.writer import CheckpointWriter, OutputTensor, shard_by_size

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
    from omnimerge.checkpoint import writer

    tensors = []
    for name, tensor in model.state_dict().items():
        for before, after in renames.items():
            if name.startswith(before):
                name = after + name[len(before) :]
                break
        tensors.append(OutputTensor(name, dtype_name(torch.bfloat16), tuple(tensor.shape)))
    monkeypatch.setattr(writer, "_reserve", lambda fd, size: writer.os.ftruncate(fd, size))
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
