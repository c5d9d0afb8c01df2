"""A checkpoint of ten thousand tensors is merged, every one of them, in time that is linear."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from omnimerge.checkpoint import Checkpoint

EXPERTS, HIDDEN, HEAD, VOCAB = 128, 4, 2, 8
PER_LAYER = 3 * EXPERTS + 9
ONE, FEW, MANY = 1, 6, 26  # layers
WEIGHTS = [0.25, 0.75]


def shapes(layers):
    """Name -> shape, as Qwen3-MoE is published."""
    found = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    found["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(layers):
        block, moe = f"model.layers.{i}", f"model.layers.{i}.mlp"
        found |= {f"{block}.self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qo"}
        found |= {f"{block}.self_attn.{x}_proj.weight": (HEAD, HIDDEN) for x in "kv"}
        found |= {f"{block}.self_attn.{x}_norm.weight": (HEAD,) for x in "qk"}
        found |= {f"{block}.{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
        found[f"{moe}.gate.weight"] = (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            found |= {f"{moe}.experts.{e}.{x}_proj.weight": (2, HIDDEN) for x in ("gate", "up")}
            found[f"{moe}.experts.{e}.down_proj.weight"] = (HIDDEN, 2)
    return found


def save(folder, layers, number):
    """A model that differs a little from an ancestor."""
    folder.mkdir()
    wanted = shapes(layers)
    flat = torch.randn(sum(torch.Size(s).numel() for s in wanted.values()), generator=seeded(0))
    flat += 0.1 * torch.randn(len(flat), generator=seeded(number))
    parts = flat.split([torch.Size(shape).numel() for shape in wanted.values()])
    tensors = {
        name: part.reshape(shape).clone()
        for (name, shape), part in zip(wanted.items(), parts, strict=True)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": HEAD, "hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": 2,
        "moe_intermediate_size": 2, "vocab_size": VOCAB, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def seeded(number):
    return torch.Generator().manual_seed(number)


MERGING = """
import json, sys, time
from pathlib import Path
from omnimerge.engine import build_plan, load_recipe, run_plan
for recipe, out in json.loads(sys.argv[1]):
    start = time.process_time()
    plan = build_plan(load_recipe(recipe), ancestor=False)  # which samples no more of many
    run_plan(plan, Path(out))
    print((time.process_time() - start) / len(plan.jobs))
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Merge pairs of one, few and many layers where no test looks at the types of every call.

    Gives the models and the output of the last, and the processors' seconds for a tensor of each.
    """
    root, recipes = tmp_path_factory.mktemp("mixtures"), []
    for layers in (ONE, FEW, MANY):
        models = [save(root / f"{layers}-{number}", layers, number) for number in (1, 2)]
        recipe = {"method": "linear", "target": models[0], "models": models}
        recipe |= {"parameters": {"weights": WEIGHTS}, "max_shard_size": "100KB"}
        recipes.append((recipe, str(root / f"merged-{layers}")))
    done = subprocess.run(
        [sys.executable, "-c", MERGING, json.dumps(recipes)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return models, root / f"merged-{MANY}", [float(line) for line in done.stdout.split()]


def test_ten_thousand_tensors_are_merged(merged):
    models, out, _ = merged
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    with Checkpoint.open(out) as written:
        found = {name: meta.shape for name, meta in written.tensors.items()}
        assert found == shapes(MANY) and len(found) == MANY * PER_LAYER + 3 == 10_221
        assert {name: meta.file.name for name, meta in written.tensors.items()} == index
        assert len(written.files) > 3
        one, two = map(Checkpoint.open, models)
        for name in [*random.Random(0).sample(sorted(found), 300), "lm_head.weight"]:
            expected = WEIGHTS[0] * one.read_tensor(name) + WEIGHTS[1] * two.read_tensor(name)
            torch.testing.assert_close(written.read_tensor(name), expected)
    described = json.loads((out / "merge_manifest.json").read_text())
    assert described["tensors"].keys() == found.keys()
    assert described["counts"] == {"linear": len(found), "kept": 0}


def test_the_time_of_a_tensor_does_not_grow_with_their_number(merged):
    """Of the processors, and far from the factor of 4 that a look at all pairs would take."""
    _, few, many = merged[2]
    assert many < 2 * few, (few, many)  # one layer has paid for what is paid once
