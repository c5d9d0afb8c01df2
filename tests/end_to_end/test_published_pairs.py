"""The pairs of AdaMMS's paper and code, in their published layouts.

Three have the official result (tests/golden/adamms). For the others, checkpoints are made here in
the published layouts, and the expected result is computed here by hand: fused pieces split and
fused again with slices and torch.cat, branches by the rules of the paper.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llm_layouts import draw
from safetensors.torch import load_file, save_file

import omnimerge
from omnimerge.checkpoint import Checkpoint

LAYERS, HEADS, HEAD, HIDDEN, MLP, VOCAB = 2, 4, 8, 32, 48, 60
ALPHA = 0.3
LLAMA = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "tie_word_embeddings": False,
}


# --- checkpoints in the published layouts -------------------------------------------------------


def decoder(own: str, kv_heads: int = HEADS, bias: bool = False) -> dict[str, torch.Tensor]:
    """A Llama decoder: an ancestor's weights plus noise of its own, by neutral names."""
    kv = kv_heads * HEAD
    shapes = {"q": (HEADS * HEAD, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN)}
    shapes |= {"o": (HIDDEN, HEADS * HEAD), "gate": (MLP, HIDDEN), "up": (MLP, HIDDEN)}
    shapes |= {"down": (HIDDEN, MLP), "norm1": (HIDDEN,), "norm2": (HIDDEN,)}
    if bias:
        shapes |= {f"{name}_bias": (shapes[name][0],) for name in "qkv"}
    whole = {"embed": (VOCAB, HIDDEN), "head": (VOCAB, HIDDEN), "norm": (HIDDEN,)}
    whole |= {f"{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    return {
        name: draw(f"ancestor/{name}", *shape) + 0.1 * draw(f"{own}/{name}", *shape)
        for name, shape in whole.items()
    }


def llava(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Original LLaVA naming: LLaVA-1.5, ShareGPT4V, Yi-VL, Cambrian, LLaVA-OneVision."""
    out = {"model.embed_tokens.weight": w["embed"], "model.norm.weight": w["norm"]}
    out["lm_head.weight"] = w["head"]
    words = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
    words |= {"o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj"}
    words |= {"down": "mlp.down_proj", "norm1": "input_layernorm"}
    words |= {"norm2": "post_attention_layernorm"}
    for i in range(LAYERS):
        for short, word in words.items():
            out[f"model.layers.{i}.{word}.weight"] = w[f"{i}.{short}"]
            if f"{i}.{short}_bias" in w:
                out[f"model.layers.{i}.{word}.bias"] = w[f"{i}.{short}_bias"]
    return out


def cogvlm(text: dict[str, torch.Tensor], vision: dict[str, torch.Tensor]):
    """CogVLM: matrices twice, norms once (the text model's)."""
    out = {"model.embed_tokens.weight": text["embed"], "model.norm.weight": text["norm"]}
    out["lm_head.weight"] = text["head"]
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        out[f"{at}input_layernorm.weight"] = text[f"{i}.norm1"]
        out[f"{at}post_attention_layernorm.weight"] = text[f"{i}.norm2"]
        for branch, w in (("language", text), ("vision", vision)):
            qkv = torch.cat([w[f"{i}.q"], w[f"{i}.k"], w[f"{i}.v"]])
            out[f"{at}self_attn.{branch}_expert_query_key_value.weight"] = qkv
            out[f"{at}self_attn.{branch}_expert_dense.weight"] = w[f"{i}.o"]
            for name in ("gate", "up", "down"):
                out[f"{at}mlp.{branch}_mlp.{name}_proj.weight"] = w[f"{i}.{name}"]
    return out


def mplug(text: dict[str, torch.Tensor], vision: dict[str, torch.Tensor]):
    """mPLUG-Owl2: keys, values and norms twice, the rest once (the text model's)."""
    out = {"model.embed_tokens.weight": text["embed"], "model.norm.weight": text["norm"]}
    out["lm_head.weight"] = text["head"]
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for word, name in (("q", "q_proj"), ("o", "o_proj")):
            out[f"{at}self_attn.{name}.weight"] = text[f"{i}.{word}"]
        for name in ("gate", "up", "down"):
            out[f"{at}mlp.{name}_proj.weight"] = text[f"{i}.{name}"]
        for number, w in enumerate((text, vision)):
            for name in "kv":
                out[f"{at}self_attn.{name}_proj.multiway.{number}.weight"] = w[f"{i}.{name}"]
            out[f"{at}input_layernorm.multiway.{number}.weight"] = w[f"{i}.norm1"]
            out[f"{at}post_attention_layernorm.multiway.{number}.weight"] = w[f"{i}.norm2"]
        out[f"{at}self_attn.rotary_emb.inv_freq"] = torch.arange(HEAD // 2).float()
    return out


OWN_PARTS = {
    "llava": {"model.mm_projector.0.weight": (HIDDEN, 6), "model.mm_projector.2.weight": (3, 3)},
    "share4v": {
        "model.mm_projector.0.weight": (HIDDEN, 6),
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding": (6,),
    },
    "cogvlm": {"model.vision.boi": (1, 1, HIDDEN), "model.vision.linear_proj.norm1.weight": (6,)},
    "mplug": {
        "model.vision_model.embeddings.cls_token": (1, 1, 6),
        "model.visual_abstractor.encoder.layers.0.crossattention.output.mlp.w1.weight": (6, 6),
        "model.visual_abstractor.encoder.layers.0.crossattention.attention.k_proj.weight": (6, 6),
    },
    "yi_vl": {"model.mm_projector.0.weight": (HIDDEN, 6), "model.mm_projector.1.weight": (HIDDEN,)},
    "cambrian": {
        "model.mm_projector_aux_0.0.weight": (HIDDEN, 6),
        "model.vision_sampler_0.layers.0.cross_attn.q_proj.1.weight": (6, 6),
        "model.vision_query": (1, HIDDEN),
        "model.image_newline": (HIDDEN,),
    },
    "qwen2_vl": {"visual.blocks.0.attn.qkv.weight": (18, 6), "visual.merger.ln_q.weight": (6,)},
}
MODEL_TYPES = {"llava": "llava", "share4v": "share4v", "yi_vl": "llava"}
MODEL_TYPES |= {"cambrian": "cambrian_llama", "mplug": "mplug_owl2", "qwen2_vl": "qwen2_vl"}


def write(folder: Path, kind: str, tensors: dict[str, torch.Tensor], **config) -> Path:
    """Save as published: LLaVA and mPLUG-Owl2 as pickles, else safetensors."""
    folder.mkdir()
    own = {name: draw(f"{kind}/{name}", *shape) for name, shape in OWN_PARTS[kind].items()}
    names = list(all_tensors := {**tensors, **own})
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    pickled = kind in ("llava", "mplug")
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        part = {name: all_tensors[name].clone() for name in half}
        if pickled:
            file = f"pytorch_model-{number}-of-2.bin"
            torch.save(part, folder / file)
        else:
            file = f"model-{number:05}-of-00002.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    index = "pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    content = {**LLAMA, **config}
    if kind in MODEL_TYPES:
        content["model_type"] = MODEL_TYPES[kind]
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def merge(target: Path, donors, out: Path, alpha: float = ALPHA, **recipe):
    models = [donors] if isinstance(donors, Path) else donors
    models = [str(m) if isinstance(m, Path) else m for m in models]
    recipe = {"method": "adamms", "target": str(target), "models": models, **recipe}
    recipe["parameters"] = {"alpha": alpha, **recipe.get("parameters", {})}
    plan = omnimerge.merge(recipe, out)
    with Checkpoint.open(out) as merged:
        return plan, {name: merged.read_tensor(name) for name in merged.tensors}


def mix(target, donor, alpha=ALPHA):
    """What is expected: every tensor interpolated, by the target's names."""
    return {name: (1 - alpha) * tensor + alpha * donor[name] for name, tensor in target.items()}


def assert_equal(got, expected, kind):
    own = {name: draw(f"{kind}/{name}", *shape) for name, shape in OWN_PARTS[kind].items()}
    assert set(got) == set(expected) | set(own)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    for name, tensor in own.items():
        assert torch.equal(got[name], tensor), name


# --- the official results -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair", ["llava_into_mplug_owl2", "mplug_owl2_into_cogvlm", "llava_onevision_into_qwen2_vl"]
)
def test_official_result(pair, golden, tmp_path):
    case = golden / "adamms" / pair
    alpha = json.loads((case / "case.json").read_text())["alpha"]
    merge(case / "target", case / "donor", tmp_path / "out", alpha)
    expected = load_file(case / "expected.safetensors")
    with Checkpoint.open(tmp_path / "out") as got, Checkpoint.open(case / "target") as target:
        assert set(got.tensors) == set(target.tensors) == set(expected)
        for name, tensor in expected.items():
            meta = got.tensors[name]
            assert (meta.dtype, meta.shape) == (target.tensors[name].dtype, tuple(tensor.shape))
            torch.testing.assert_close(got.read_tensor(name), tensor, rtol=0, atol=1e-6, msg=name)
        # A target's shards keep their names; pickles become safetensors, with padded numbers.
        shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        assert [file.name for file in got.files] == shards
        for ours, theirs in zip(got.files, target.files, strict=True):
            held = [
                {n for n, m in c.tensors.items() if m.file == f}
                for c, f in ((got, ours), (target, theirs))
            ]
            assert held[0] == held[1]


# --- the other pairs ----------------------------------------------------------------------------

A, B, C, D = (decoder(own) for own in ("a", "b", "c", "d"))
LIKE_LLAVA = ("llava", "share4v", "yi_vl", "cambrian")


def test_llava_into_cogvlm(tmp_path):
    target = write(tmp_path / "t", "cogvlm", cogvlm(A, B))
    donor = write(tmp_path / "d", "llava", llava(C))
    plan, got = merge(target, donor, tmp_path / "out")
    assert_equal(got, mix(cogvlm(A, B), cogvlm(C, C)), "cogvlm")  # one tensor into both branches
    rules = {m.target: m.rule for m in plan.alignments[0].merged}
    at = "model.layers.0."
    assert rules[f"{at}mlp.vision_mlp.up_proj.weight"] == (
        "the donor's one tensor into the vision branch"
    )
    assert rules[f"{at}input_layernorm.weight"] == ""


def test_sharegpt4v_into_cogvlm(tmp_path):
    target = write(tmp_path / "t", "cogvlm", cogvlm(A, B))
    donor = write(tmp_path / "d", "share4v", llava(C))
    _, got = merge(target, donor, tmp_path / "out")
    assert_equal(got, mix(cogvlm(A, B), cogvlm(C, C)), "cogvlm")


def test_mplug_into_cogvlm_branch_by_branch(tmp_path):
    target = write(tmp_path / "t", "cogvlm", cogvlm(A, B))
    donor = write(tmp_path / "d", "mplug", mplug(C, D))
    _, got = merge(target, donor, tmp_path / "out")
    image = {**C, **{f"{i}.{n}": D[f"{i}.{n}"] for i in range(LAYERS) for n in "kv"}}
    assert_equal(got, mix(cogvlm(A, B), cogvlm(C, image)), "cogvlm")


def test_cogvlm_into_mplug(tmp_path):
    target = write(tmp_path / "t", "mplug", mplug(A, B))
    donor = write(tmp_path / "d", "cogvlm", cogvlm(C, D))
    plan, got = merge(target, donor, tmp_path / "out")
    # Shared in the target: the text branch. Norms: the donor's one into both.
    image = {**D, **{f"{i}.{n}": C[f"{i}.{n}"] for i in range(LAYERS) for n in ("norm1", "norm2")}}
    expected = mix(mplug(A, B), mplug(C, image))
    for i in range(LAYERS):  # a buffer is the target's
        name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
        expected[name] = mplug(A, B)[name]
    assert_equal(got, expected, "mplug")
    unused = plan.alignments[0].unused
    name = "model.layers.0.mlp.vision_mlp.up_proj.weight"
    assert unused[name] == "the target's tensor gets the donor's other branch"
    assert plan.kept_reasons()["a buffer, not a parameter"] == LAYERS


def test_llava_into_mplug_and_back(tmp_path):
    llava_at = write(tmp_path / "llava", "llava", llava(A))
    mplug_at = write(tmp_path / "mplug", "mplug", mplug(B, C))
    _, got = merge(llava_at, mplug_at, tmp_path / "into_llava")
    assert_equal(got, mix(llava(A), llava(B)), "llava")  # of two, the text branch
    _, got = merge(mplug_at, llava_at, tmp_path / "into_mplug")
    expected = mix(mplug(B, C), mplug(A, A))
    assert_equal(got, expected, "mplug")


@pytest.mark.parametrize(
    ("target", "donor"),
    [("llava", "share4v"), ("share4v", "llava"), ("cambrian", "yi_vl"), ("yi_vl", "cambrian")],
)
def test_models_in_llavas_naming(target, donor, tmp_path):
    heads = {"num_key_value_heads": 2}
    a, b = decoder("a", kv_heads=2), decoder("b", kv_heads=2)
    ours = write(tmp_path / "t", target, llava(a), **heads)
    theirs = write(tmp_path / "d", donor, llava(b), **heads)
    plan, got = merge(ours, theirs, tmp_path / "out")
    assert_equal(got, mix(llava(a), llava(b)), target)
    assert {a.target_slots.layout.name for a in plan.alignments} == {"llava_original"}


@pytest.mark.parametrize("target", ["qwen2_vl", "llava"])
def test_onevision_and_qwen2_vl_both_ways(target, tmp_path):
    donor = "llava" if target == "qwen2_vl" else "qwen2_vl"
    a, b = (decoder(own, kv_heads=2, bias=True) for own in "ab")
    kinds = {"num_key_value_heads": 2, "rope_theta": 1e6}
    ours = write(tmp_path / "t", target, llava(a), **kinds)
    theirs = write(tmp_path / "d", donor, llava(b), **kinds)
    _, got = merge(ours, theirs, tmp_path / "out")
    assert_equal(got, mix(llava(a), llava(b)), target)


# --- options of the scripts ---------------------------------------------------------------------


def test_norms_left_out(tmp_path):
    target = write(tmp_path / "t", "cogvlm", cogvlm(A, B))
    donor = write(tmp_path / "d", "llava", llava(C))
    without = [{"match": {"slot": "norm"}, "keep": "target"}]
    _, got = merge(target, donor, tmp_path / "out", overrides=without)
    norms = ("model.norm", "input_layernorm", "post_attention_layernorm")
    expected = mix(cogvlm(A, B), cogvlm(C, C))
    kept = [name for name in expected if any(norm in name for norm in norms)]
    assert len(kept) == 1 + 2 * LAYERS
    expected |= {name: cogvlm(A, B)[name] for name in kept}
    assert_equal(got, expected, "cogvlm")
    assert all(torch.equal(got[name], expected[name]) for name in kept)


def test_double_interpolation(tmp_path):
    """CogVLM-chat with CogVLM-grounding and mPLUG-Owl2: shares α(1-β), β and (1-α)(1-β)."""
    alpha, beta = 0.7, 0.2
    chat = write(tmp_path / "chat", "cogvlm", cogvlm(A, B))
    grounding = write(tmp_path / "grounding", "cogvlm", cogvlm(C, C))
    owl = write(tmp_path / "owl", "mplug", mplug(D, D))
    shares = alpha * (1 - beta), beta, (1 - alpha) * (1 - beta)
    donors = [{"model": str(grounding), "weight": shares[1]}]
    donors += [{"model": str(owl), "weight": shares[2]}]
    _, got = merge(chat, donors, tmp_path / "out", alpha=1 - shares[0])
    parts = cogvlm(A, B), cogvlm(C, C), cogvlm(D, D)
    expected = {
        name: sum(share * part[name] for share, part in zip(shares, parts, strict=True))
        for name in parts[0]
    }
    assert_equal(got, expected, "cogvlm")


def test_triple_interpolation(tmp_path):
    alpha, beta, gamma = 0.8, 0.6, 0.5
    shares = (alpha * gamma + beta * (1 - gamma), (1 - beta) * (1 - gamma), (1 - alpha) * gamma)
    assert sum(shares) == pytest.approx(1)
    chat = write(tmp_path / "chat", "cogvlm", cogvlm(A, B))
    grounding = write(tmp_path / "grounding", "cogvlm", cogvlm(C, D))
    owl = write(tmp_path / "owl", "mplug", mplug(D, D))
    recipe = {"parameters": {"weights": [shares[1], shares[2]]}}
    _, got = merge(chat, [grounding, owl], tmp_path / "out", alpha=1 - shares[0], **recipe)
    parts = cogvlm(A, B), cogvlm(C, D), cogvlm(D, D)
    expected = {
        name: sum(share * part[name] for share, part in zip(shares, parts, strict=True))
        for name in parts[0]
    }
    assert_equal(got, expected, "cogvlm")


def test_a_donor_that_does_not_reach_a_tensor_leaves_the_targets_share(tmp_path):
    """Equation 2 per donor: with `select: all`, the towers of both CogVLMs are merged too."""
    chat = write(tmp_path / "chat", "cogvlm", cogvlm(A, B))
    grounding = write(tmp_path / "grounding", "cogvlm", cogvlm(C, C))
    owl = write(tmp_path / "owl", "mplug", mplug(D, D))
    _, got = merge(chat, [grounding, owl], tmp_path / "out", select="all")
    tower = "model.vision.linear_proj.norm1.weight"
    both = draw(f"cogvlm/{tower}", 6)  # the same in both
    torch.testing.assert_close(got[tower], both)
    name = "model.layers.1.mlp.vision_mlp.up_proj.weight"
    wanted = (1 - ALPHA) * B["1.up"] + ALPHA / 2 * (C["1.up"] + D["1.up"])
    torch.testing.assert_close(got[name], wanted, rtol=1e-5, atol=1e-6)


# --- branches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("branches", "source"),
    [({"shared": "vision"}, D), ({"shared": "text"}, C), ({"shared": "keep"}, None)],
)
def test_another_branch_for_single_tensors(branches, source, tmp_path):
    target = write(tmp_path / "t", "llava", llava(A))
    donor = write(tmp_path / "d", "cogvlm", cogvlm(C, D))
    plan, got = merge(target, donor, tmp_path / "out", branches=branches)
    (branch,) = branches.values()
    for i in range(LAYERS):
        name = f"model.layers.{i}.self_attn.k_proj.weight"
        expected = (
            A[f"{i}.k"] if source is None else mix({"k": A[f"{i}.k"]}, {"k": source[f"{i}.k"]})["k"]
        )
        torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-6)
    norm = "model.layers.0.input_layernorm.weight"  # single on both sides: no branch to choose
    torch.testing.assert_close(got[norm], mix({"n": A["0.norm1"]}, {"n": C["0.norm1"]})["n"])
    if branch == "keep":
        assert plan.kept_reasons()["branches: shared: keep"] == 7 * LAYERS


def test_the_targets_image_branch_can_be_left_alone(tmp_path):
    """Appendix B's wording: what the target alone holds twice is retained."""
    target = write(tmp_path / "t", "cogvlm", cogvlm(A, B))
    donor = write(tmp_path / "d", "llava", llava(C))
    _, got = merge(target, donor, tmp_path / "out", branches={"vision": "keep"})
    expected = mix(cogvlm(A, B), cogvlm(C, C))
    expected |= {name: t for name, t in cogvlm(A, B).items() if "vision" in name}
    assert_equal(got, expected, "cogvlm")


def test_alpha_zero_and_one(tmp_path):
    target = write(tmp_path / "t", "cogvlm", cogvlm(A, B))
    donor = write(tmp_path / "d", "mplug", mplug(C, C))
    _, zero = merge(target, donor, tmp_path / "zero", alpha=0.0)
    for name, tensor in cogvlm(A, B).items():
        assert torch.equal(zero[name].view(torch.int32), tensor.view(torch.int32)), name
    _, one = merge(target, donor, tmp_path / "one", alpha=1.0)
    assert_equal(one, cogvlm(C, C), "cogvlm")
