"""Layouts: fused, interleaved and duplicated tensors, inserted layers, files of one's own."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import llm_layouts as families
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import omnimerge
from omnimerge.arch import layouts, read_layouts, slots_of
from omnimerge.arch.geometry import geometry
from omnimerge.arch.rows import SlotRows
from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import LayoutError

ALPHA = 0.25
A, B, C = (families.decoder(own) for own in "abc")

# name -> how the family lays a decoder out, and its layout
FAMILIES = {
    "internlm2_chat": families.internlm2,
    "internlm2": lambda w: families.internlm2(w, "model.", "output"),
    "phi3": families.phi3,
    "phi4_multimodal": lambda w: families.phi3(w, ".base_layer"),
    "qwen_vl": families.qwen_vl,
    "minicpmv": lambda w: families.llama(w, "llm.model.", "llm.lm_head"),
    "deepseek_vl": lambda w: families.llama(w, "language_model.model.", "language_model.lm_head"),
    "plain": families.llama,
    "thinker_v5": lambda w: families.llama(w, "thinker.model.language_model.", "thinker.lm_head"),
}
OWN = {
    "internlm2_chat": ["vision_model.encoder.layers.0.attn.qkv.weight", "mlp1.0.weight"],
    "internlm2": ["vit.vision_tower.x.weight", "model.layers.0.attention.wqkv.Plora_A.weight"],
    "phi3": ["model.vision_embed_tokens.img_projection.0.weight"],
    "phi4_multimodal": ["model.layers.1.self_attn.qkv_proj.lora_A.vision.weight"],
    "qwen_vl": ["transformer.visual.attn_pool.kv_proj.weight"],
    "minicpmv": ["vpm.encoder.layers.0.self_attn.q_proj.weight", "resampler.attn.in_proj_weight"],
    "deepseek_vl": ["vision_model.vision_tower_low.x.weight", "aligner.layers.0.weight"],
    "plain": [],
    "thinker_v5": ["thinker.model.visual.blocks.0.attn.qkv.weight", "talker.model.x.weight"],
}


def saved(folder, kind, w, **config):
    own = {name: families.draw(name, 4, 4) for name in OWN[kind]}
    return families.write(folder, {**FAMILIES[kind](w), **own}, **config)


def merged(target, donor, out, alpha=ALPHA, **recipe):
    recipe = {"method": "adamms", "target": str(target), "models": [str(donor)], **recipe}
    plan = omnimerge.merge({**recipe, "parameters": {"alpha": alpha}}, out)
    with Checkpoint.open(out) as checkpoint:
        return plan, {name: checkpoint.read_tensor(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("donor", list(FAMILIES))
@pytest.mark.parametrize("target", list(FAMILIES))
def test_every_family_into_every_other(target, donor, tmp_path):
    ours, theirs = saved(tmp_path / "t", target, A), saved(tmp_path / "d", donor, B)
    plan, got = merged(ours, theirs, tmp_path / "out")
    expected = {
        name: (1 - ALPHA) * tensor + ALPHA * FAMILIES[target](B)[name]
        for name, tensor in FAMILIES[target](A).items()
    }
    assert set(got) == set(expected) | set(OWN[target])
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    for name in OWN[target]:
        assert torch.equal(got[name], families.draw(name, 4, 4))
    (alignment,) = plan.alignments
    assert set(alignment.unused) == set(OWN[donor])
    if target != donor:
        assert all(m.rule == "" for m in alignment.merged)


def test_layouts_are_told_apart_by_their_tensors(tmp_path):
    named = {"phi4_multimodal": "phi3", "deepseek_vl": "hf_nested"}
    for kind in FAMILIES:
        with Checkpoint.open(saved(tmp_path / kind, kind, A)) as checkpoint:
            assert slots_of(checkpoint).layout.name == named.get(kind, kind)


@settings(max_examples=60, deadline=None)
@given(
    kv_heads=st.integers(1, 4),
    groups=st.integers(1, 4),
    head_dim=st.sampled_from([2, 4, 8]),
    op=st.sampled_from(["concat", "grouped"]),
)
def test_cutting_a_fused_tensor_loses_nothing(tmp_path_factory, kv_heads, groups, head_dim, op):
    heads, hidden = kv_heads * groups, 12
    rows = (heads + 2 * kv_heads) * head_dim
    fused = torch.arange(rows * hidden, dtype=torch.float32).reshape(rows, hidden)
    words = {"concat": "self_attn.qkv_proj", "grouped": "attention.wqkv"}
    prefix = {"concat": "model.", "grouped": "model."}[op]
    embed = {"concat": "embed_tokens", "grouped": "tok_embeddings"}[op]
    tensors = {f"{prefix}layers.0.{words[op]}.weight": fused}
    tensors |= {f"{prefix}{embed}.weight": torch.zeros(5, hidden)}
    tensors |= {f"{prefix}norm.weight": torch.ones(hidden)}
    folder = tmp_path_factory.mktemp("fused") / "it"
    families.write(folder, tensors, num_attention_heads=heads, head_dim=head_dim)
    with Checkpoint.open(folder) as checkpoint:
        slots = slots_of(checkpoint)
        held = SlotRows(checkpoint, slots, geometry(checkpoint, slots))
    name = f"{prefix}layers.0.{words[op]}.weight"
    covered = sorted((p.start, p.start + p.count) for p in held.by_name[name])
    assert covered[0][0] == 0 and covered[-1][1] == fused.numel()
    assert all(a[1] == b[0] for a, b in pairwise(covered))
    flat = fused.flatten()
    parts = {}
    for slot in "qkv":
        pieces = sorted(
            held.by_slot[f"llm.layers.0.attn.{slot}.weight"], key=lambda p: p.slot_start
        )
        parts[slot] = torch.cat([flat[p.start : p.start + p.count] for p in pieces])
    if op == "concat":
        expected = fused.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
    else:
        grouped = fused.reshape(kv_heads, groups + 2, head_dim, hidden)
        expected = (grouped[:, :-2], grouped[:, -2], grouped[:, -1])
    for slot, tensor in zip("qkv", expected, strict=True):
        assert torch.equal(parts[slot], tensor.flatten()), slot


def test_cogvlm2_has_a_bias_on_its_vision_expert_only(tmp_path):
    config = {"num_multi_query_heads": families.KV_HEADS, "num_key_value_heads": None}
    target = families.write(tmp_path / "t", families.cogvlm2(A, B), **config)
    donor = families.write(tmp_path / "d", families.llama(C))
    plan, got = merged(target, donor, tmp_path / "out")
    expected = {
        name: tensor
        if name.endswith("bias")
        else (1 - ALPHA) * tensor + ALPHA * families.cogvlm2(C, C)[name]
        for name, tensor in families.cogvlm2(A, B).items()
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
    (alignment,) = plan.alignments
    assert set(alignment.kept.values()) == {"the donor has no such tensor"}
    assert len(alignment.kept) == families.LAYERS
    assert alignment.target_geometry.kv_heads == families.KV_HEADS


def test_biases_of_a_fused_target(tmp_path):
    """A donor's three biases go into one; a donor without them leaves it."""
    a, b = families.decoder("a", bias=True), families.decoder("b", bias=True)

    def fused(w):
        out = families.phi3(w)
        for i in range(families.LAYERS):
            bias = torch.cat([w[f"{i}.{n}_bias"] for n in "qkv"])
            out[f"model.layers.{i}.self_attn.qkv_proj.bias"] = bias
        return out

    target = families.write(tmp_path / "t", fused(a))
    donor = families.write(tmp_path / "d", families.llama(b))
    _, got = merged(target, donor, tmp_path / "out")
    name = "model.layers.2.self_attn.qkv_proj.bias"
    torch.testing.assert_close(got[name], (1 - ALPHA) * fused(a)[name] + ALPHA * fused(b)[name])


def test_mllama_gets_its_llms_layers_by_an_explicit_map(tmp_path):
    target = families.write(tmp_path / "t", families.mllama(A))
    donor = families.write(tmp_path / "d", families.llama(B))
    plan, got = merged(target, donor, tmp_path / "out")
    ours = families.mllama(A)
    for own, theirs in ((0, 0), (1, 1), (3, 2)):
        name = f"language_model.model.layers.{own}.mlp.up_proj.weight"
        expected = (1 - ALPHA) * ours[name] + ALPHA * B[f"{theirs}.up"]
        torch.testing.assert_close(got[name], expected, msg=name)
    for name, tensor in ours.items():  # the inserted layer is the target's own
        if ".layers.2." in name:
            assert torch.equal(got[name], tensor), name
            assert plan.alignments[0].kept[name] == "projector is the target's own"
    embed = "language_model.model.embed_tokens.weight"  # eight rows more than the donor's
    assert plan.alignments[0].kept[embed].startswith("vocabularies differ: target 68 rows")
    kinds = dict(plan.alignments[0].heterogeneity)
    assert kinds["inserted layers"].startswith("the target has inserted layers: 3 of the first 4")


def test_a_naive_layer_count_is_refused(tmp_path):
    """Without the map, layer 2 of the donor would have met the cross-attention layer's MLP."""
    ours = families.mllama(A)
    stripped = {n: t for n, t in ours.items() if "cross_attn" not in n}
    target = families.write(tmp_path / "t", stripped)
    donor = families.write(tmp_path / "d", families.llama(B))
    reasons = omnimerge.align(target, donor).reasons()
    assert any("layer count differs: target 4, donor 3" in reason for reason in reasons)


def test_sizes_that_do_not_cut_are_refused(tmp_path):
    folder = families.write(tmp_path / "t", families.phi3(A), num_attention_heads=7, head_dim=8)
    with pytest.raises(LayoutError, match=r"64 rows cannot be cut .* with 7 heads of 8"):
        omnimerge.align(folder, folder)
    folder = families.write(tmp_path / "u", families.phi3(A), num_attention_heads=None)
    with pytest.raises(LayoutError, match=r"its config.json tells no num_attention_heads"):
        omnimerge.align(folder, folder)


def test_two_tensors_for_one_slot_are_refused(tmp_path):
    tensors = families.phi3(A)
    name = "model.layers.0.self_attn.o_proj"
    tensors[f"{name}.base_layer.weight"] = tensors[f"{name}.weight"]
    folder = families.write(tmp_path / "t", tensors)
    with pytest.raises(LayoutError, match=r"base_layer.weight' and .*o_proj.weight' are both"):
        omnimerge.align(folder, folder)


# --- planted mistakes ---------------------------------------------------------------------------


def _swap(one, two):
    def change(tensors):
        for name in list(tensors):
            if one in name:
                other = name.replace(one, two)
                tensors[name], tensors[other] = tensors[other], tensors[name]
        return tensors

    return change


def _shift(tensors):
    shifted = {}
    for name, tensor in tensors.items():
        match = re.search(r"layers\.(\d+)\.", name)
        number = (int(match.group(1)) + 1) % families.LAYERS if match else 0
        shifted[re.sub(r"layers\.\d+\.", f"layers.{number}.", name)] = tensor
    return shifted


def _permute(tensors):
    order = torch.randperm(families.VOCAB, generator=torch.Generator().manual_seed(1))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][order].contiguous()
    return tensors


def _swap_inside(name, halves):
    def change(tensors):
        for key, tensor in tensors.items():
            if name in key:
                parts = tensor.split(halves)
                tensors[key] = torch.cat([parts[1], parts[0], *parts[2:]])
        return tensors

    return change


PLANTED = {
    "gate and up": (
        families.llama,
        _swap("gate_proj", "up_proj"),
        "no ancestor|no common ancestor",
    ),
    "q and o": (families.llama, _swap("q_proj", "o_proj"), "no ancestor|no common ancestor"),
    "layers shifted": (families.llama, _shift, "share no ancestor"),
    "vocabulary permuted": (families.llama, _permute, "vocabularies may be in another order"),
    "gate and up, fused": (
        families.phi3,
        _swap_inside("gate_up_proj", families.MLP),
        "no common ancestor",
    ),
    "k and v, fused": (
        families.phi3,
        lambda tensors: {
            name: torch.cat([t[:32], t[48:], t[32:48]]) if "qkv_proj" in name else t
            for name, t in tensors.items()
        },
        "no common ancestor",
    ),
    "interleaved taken for one after the other": (
        families.phi3,
        lambda tensors: {
            name: t.reshape(2, 32, -1).transpose(0, 1).reshape(64, -1) if "qkv_proj" in name else t
            for name, t in tensors.items()
        },
        "no common ancestor",
    ),
}


@pytest.mark.parametrize("mistake", list(PLANTED))
def test_planted_mistake_is_refused(mistake, tmp_path):
    family, change, words = PLANTED[mistake]
    target = families.write(tmp_path / "t", families.llama(A))
    fine = families.write(tmp_path / "fine", family(B))
    assert omnimerge.align(target, fine).reasons() == []
    wrong = families.write(tmp_path / "wrong", change(dict(family(B))))
    reasons = omnimerge.align(target, wrong).reasons()
    assert len(reasons) == (2 if "vocabulary" in mistake else 1)  # embedding and head
    for reason in reasons:
        assert re.search(words, reason) and "--force ancestor" in reason
        assert re.search(r"-?0\.\d{3}", reason)  # the value
    with pytest.raises(omnimerge.OmnimergeError, match="cannot merge"):
        merged(target, wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_foreign_ancestor_is_refused(tmp_path):
    target = families.write(tmp_path / "t", families.phi3(A))
    foreign = families.decoder("b", ancestor="foreign")
    donor = families.write(tmp_path / "d", families.llama(foreign))
    (reason,) = omnimerge.align(target, donor).reasons()
    assert "share no ancestor" in reason


# --- geometry -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("eps", "refused"), [(1e-5, False), (1e-3, True)])
def test_epsilon_of_the_norms(eps, refused, tmp_path):
    target = families.write(tmp_path / "t", families.llama(A))
    donor = families.write(tmp_path / "d", families.llama(B), rms_norm_eps=eps)
    alignment = omnimerge.align(target, donor)
    text = f"epsilon of the norms differs: target 1e-06, donor {eps}"
    found = alignment.reasons() if refused else alignment.notes
    assert any(line.startswith(text) for line in found)
    assert bool(alignment.reasons()) == refused


def test_rope_base_per_kind_of_layer(tmp_path):
    kinds = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}
    kinds["sliding_attention"] = {"rope_theta": 1e4, "rope_type": "default"}
    folder = families.write(
        tmp_path / "t", families.llama(A), rope_theta=None, rope_parameters=kinds
    )
    with Checkpoint.open(folder) as checkpoint:
        assert geometry(checkpoint, slots_of(checkpoint)).rope_theta == 1e6


def test_packed_weights_are_refused_by_a_gate_of_their_own(tmp_path):
    target = families.write(tmp_path / "t", families.llama(A))
    tensors = families.llama(B)
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(4, 4, dtype=torch.int32)
    donor = families.write(tmp_path / "d", tensors)
    alignment = omnimerge.align(target, donor)
    assert any("the donor's weights are quantised" in r for r in alignment.reasons())
    gates = alignment.to_dict()["gates"]
    assert "quantization" in gates
    assert alignment.to_dict(force=["quantization", "accounting"])["mergeable"]


# --- files of one's own -------------------------------------------------------------------------

MINE = """
name: mine
about: an invented family
prefix: trunk.
embed: table
norm: last
layers: stage.{i}.
head: answer
block:
  n1: input_norm
  mix: {grouped: [attn.q, attn.k, attn.v]}
  out: attn.o
  n2: post_attention_norm
  wide: {concat: [mlp.up, mlp.gate]}
  narrow: mlp.down
"""


def invented(w):
    plain = families.internlm2(w)
    out = {"trunk.table.weight": w["embed"], "trunk.last.weight": w["norm"]}
    out["answer.weight"] = w["head"]
    for i in range(families.LAYERS):
        at = f"trunk.stage.{i}."
        out[f"{at}mix.weight"] = plain[f"language_model.model.layers.{i}.attention.wqkv.weight"]
        out[f"{at}out.weight"], out[f"{at}narrow.weight"] = w[f"{i}.o"], w[f"{i}.down"]
        out[f"{at}wide.weight"] = torch.cat([w[f"{i}.up"], w[f"{i}.gate"]])
        out[f"{at}n1.weight"], out[f"{at}n2.weight"] = w[f"{i}.norm1"], w[f"{i}.norm2"]
    return out


def test_a_layout_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(MINE)
    target = families.write(tmp_path / "t", invented(A))
    families.write(tmp_path / "d", families.llama(B))
    with Checkpoint.open(target) as checkpoint, pytest.raises(LayoutError, match="fit no known"):
        slots_of(checkpoint)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "method": "adamms",
                "target": "t",
                "models": ["d"],
                "parameters": {"alpha": ALPHA},
                "layouts": ["mine.yaml"],  # beside the recipe
            }
        )
    )
    omnimerge.merge(recipe, tmp_path / "out")
    with Checkpoint.open(tmp_path / "out") as got:
        for name, tensor in invented(A).items():
            expected = (1 - ALPHA) * tensor + ALPHA * invented(B)[name]
            torch.testing.assert_close(got.read_tensor(name), expected, rtol=1e-6, atol=1e-6)
    assert omnimerge.inspect(target, layouts=[file])["layout"] == "mine"
    assert {check.state for check in omnimerge.verify(tmp_path / "out", deep=True)} == {"ok"}
    file.unlink()
    checks = {check.name: check.state for check in omnimerge.verify(tmp_path / "out")}
    assert checks["tied tensors"] == "skipped" and checks["finite numbers"] == "ok"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("block:", "blok:"), "'blok' is no key, did you mean 'block'"),
        (("head: answer\n", ""), "'head' is missing"),
        (("stage.{i}.", "stage."), "must hold {i} once"),
        (("attn.o", "attn.o@image"), "branch 'image' is none of"),
        (("{concat: [mlp.up, mlp.gate]}", "{concat: mlp.up}"), "is neither a slot nor"),
        (("{concat: [mlp.up, mlp.gate]}", "{concat: [mlp.up]}"), "is neither a slot nor"),
        (("{grouped: [attn.q, attn.k, attn.v]}", "{grouped: [a, b]}"), "grouped takes"),
        (("norm: last", "norm: 3"), "norm: 3 is no text"),
        (("name: mine", "- a\n- b"), "cannot read layout"),
    ],
)
def test_mistakes_in_a_layout_file(change, message, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(MINE.replace(*change))
    with pytest.raises(LayoutError, match=re.escape(message)):
        read_layouts(file)
    with pytest.raises(LayoutError, match=r"cannot read layout .*nowhere.yaml: No such file"):
        read_layouts(tmp_path / "nowhere.yaml")


def test_every_builtin_file_says_whom_it_is_for():
    for layout in layouts():
        assert len(layout.about) > 5
        assert layout.layers.count("{i}") == 1
        slots = [slot for entry in layout.block.values() for slot in entry.slots]
        needed = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"}
        assert needed <= set(slots), layout.name


# --- vocabularies -------------------------------------------------------------------------------


def tokens(*words):
    return {word: number for number, word in enumerate(words)}


def test_overlap_merges_the_rows_of_common_tokens(tmp_path):
    common = [f"t{i}" for i in range(50)]
    ours = tokens(*common, "<image>", "only ours")  # 52 of 60 rows: the rest is padding
    theirs = tokens("<s>", *reversed(common), "<image>")  # 52 of 56 rows, in another order
    a, b = families.decoder("a", vocab=60), families.decoder("b", vocab=60)
    for name in ("embed", "head"):  # the donor's rows, moved to where its tokens are
        moved = families.draw(f"fresh/{name}", 56, families.HIDDEN)
        for token, row in theirs.items():
            if token in ours:
                moved[row] = b[name][ours[token]]
        b[f"moved {name}"] = moved
    donor_tensors = families.llama({**b, "embed": b["moved embed"], "head": b["moved head"]})
    target = families.write(tmp_path / "t", families.phi3(a), tokens=ours)
    donor = families.write(tmp_path / "d", donor_tensors, tokens=theirs)

    auto = omnimerge.align(target, donor)
    assert auto.kept["lm_head.weight"] == "vocabularies differ: target 60 rows, donor 56"
    plan, got = merged(target, donor, tmp_path / "out", vocabulary="overlap")
    for name, key in (("model.embed_tokens.weight", "embed"), ("lm_head.weight", "head")):
        expected = a[key].clone()
        rows = [ours[token] for token in ours if token in theirs]
        assert len(rows) == 51
        expected[rows] = (1 - ALPHA) * a[key][rows] + ALPHA * b[key][rows]
        torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-6)
        kept = [row for row in range(60) if row not in rows]
        assert torch.equal(got[name][kept], a[key][kept])  # bit for bit
    rules = {m.target: (m.op, m.rule) for m in plan.alignments[0].merged}
    assert rules["lm_head.weight"] == ("overlap", "overlap: 51 of 60 rows")


def test_overlap_of_equal_vocabularies_is_the_whole(tmp_path):
    ids = tokens(*(f"t{i}" for i in range(families.VOCAB)))
    target = families.write(tmp_path / "t", families.llama(A), tokens=ids)
    donor = families.write(tmp_path / "d", families.llama(B), tokens=ids)
    _, got = merged(target, donor, tmp_path / "out", vocabulary="overlap")
    expected = (1 - ALPHA) * A["head"] + ALPHA * B["head"]
    torch.testing.assert_close(got["lm_head.weight"], expected)


def test_overlap_with_task_vectors_keeps_rows_that_the_base_lacks(tmp_path):
    """A row that only the models have has no task vector: it stays the target's."""
    ours = tokens(*(f"t{i}" for i in range(families.VOCAB)))
    small = dict(list(ours.items())[:40])
    base_w = families.decoder("base")
    base_w |= {name: base_w[name][:40] for name in ("embed", "head")}
    base = families.write(tmp_path / "b", families.llama(base_w), tokens=small)
    target = families.write(tmp_path / "t", families.phi3(A), tokens=ours)
    donor = families.write(tmp_path / "d", families.llama(B), tokens=ours)
    recipe = {
        "method": "task_arithmetic",
        "target": str(target),
        "base": str(base),
        "models": [str(target), str(donor)],
        "parameters": {"scale": 0.5},
        "select": "language_model",
        "vocabulary": "overlap",
    }
    omnimerge.merge(recipe, tmp_path / "out")
    with Checkpoint.open(tmp_path / "out") as got:
        head = got.read_tensor("lm_head.weight")
        up = got.read_tensor("model.layers.0.mlp.gate_up_proj.weight")[families.MLP :]
    expected = base_w["head"] + 0.5 * ((A["head"] + B["head"])[:40] - 2 * base_w["head"])
    torch.testing.assert_close(head[:40], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(head[40:], A["head"][40:])
    wanted = base_w["0.up"] + 0.5 * (A["0.up"] + B["0.up"] - 2 * base_w["0.up"])
    torch.testing.assert_close(up, wanted, rtol=1e-5, atol=1e-6)


def test_overlap_needs_both_tokenizers(tmp_path):
    target = families.write(tmp_path / "t", families.llama(A), tokens=tokens("a"))
    donor = families.write(tmp_path / "d", families.llama(B))
    with pytest.raises(LayoutError, match=r"overlap matches tokens by name, and .*/d has neither"):
        omnimerge.align(target, donor, vocabulary="overlap")


def test_a_sentencepiece_model_tells_its_tokens(tmp_path):
    from omnimerge.arch.vocabulary import token_ids
    from omnimerge.errors import CheckpointError

    def piece(text):
        body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + b"\x00\x00\x80\x3f" + b"\x18\x01"
        return b"\x0a" + bytes([len(body)]) + body

    trainer = b"\x12\x03\x08\x96\x01"  # field 2, skipped
    content = piece(b"<s>") + piece("▁über".encode()) + trainer + piece(b"</s>")
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 3}))
    assert token_ids(tmp_path) == {"<s>": 0, "▁über": 1, "</s>": 2, "<pad>": 3}
    (tmp_path / "tokenizer.model").write_bytes(content[:-3])
    with pytest.raises(CheckpointError, match="is not a SentencePiece model"):
        token_ids(tmp_path)


# --- tied heads ---------------------------------------------------------------------------------


def untied(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def test_tied_against_untied_heads(tmp_path):
    tied = {**A, "head": A["embed"]}
    one = families.write(tmp_path / "tied", untied(families.phi3(tied)), tie_word_embeddings=True)
    two = families.write(tmp_path / "untied", families.llama(B))
    plan, got = merged(one, two, tmp_path / "into_tied")
    assert "lm_head.weight" not in got
    assert plan.alignments[0].unused["lm_head.weight"] == (
        "the target ties its head to the embedding"
    )
    assert dict(plan.alignments[0].heterogeneity)["tied head"].startswith("the target ties")

    # The other way the donor's embedding stands in for its head, if they are alike.
    alignment = omnimerge.align(two, one)
    assert alignment.reasons() == []
    why = "the donor's head is its embedding, which is unlike this one"
    assert alignment.kept["lm_head.weight"] == why
    once_tied = families.llama({**B, "head": A["embed"] + 0.1 * B["head"]})
    three = families.write(tmp_path / "once_tied", once_tied)
    ops = {m.target: (m.op, m.rule) for m in omnimerge.align(three, one).merged}
    assert ops["lm_head.weight"] == ("tied", "the donor's head is its embedding")


# --- what is written ----------------------------------------------------------------------------


def test_the_manifest_names_sources_and_rules(tmp_path):
    target = saved(tmp_path / "t", "phi3", A)
    donor = saved(tmp_path / "d", "internlm2_chat", B)
    merged(target, donor, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    entry = manifest["tensors"]["model.layers.0.mlp.gate_up_proj.weight"]
    at = "language_model.model.layers.0.feed_forward."
    assert entry["sources"] == [[f"{at}w1.weight", f"{at}w3.weight"]]


def test_bfloat16_and_mixed_dtypes_are_read_piece_by_piece(tmp_path):
    donor_tensors = {
        name: t.bfloat16() if "k_proj" in name else t for name, t in families.llama(B).items()
    }
    target = families.write(tmp_path / "t", families.phi3(A))
    donor = families.write(tmp_path / "d", donor_tensors, shards=2)
    _, got = merged(target, donor, tmp_path / "out", alpha=1.0)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    expected = torch.cat([B["1.q"], B["1.k"].bfloat16().float(), B["1.v"]])
    torch.testing.assert_close(got[name], expected, rtol=0, atol=0)


def test_a_damaged_donor_is_found_while_it_is_read(tmp_path):
    """A view reads through the donor's own checks: a truncated file is no silent zero."""
    target = families.write(tmp_path / "t", families.phi3(A))
    donor = families.write(tmp_path / "d", families.llama(B))
    (file,) = Path(donor).glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(omnimerge.OmnimergeError, match=r"qkv_proj.weight' of .*/d holds NaN"):
        merged(target, donor, tmp_path / "out")
    assert not (tmp_path / "out").exists()
