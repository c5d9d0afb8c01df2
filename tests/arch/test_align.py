"""Alignment: complete accounting, and the gates that refuse a pair."""

import json
import shutil

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from omnimerge.arch import align, layouts, memory_names, slot_map
from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import CheckpointError, LayoutError, RecipeError


def aligned(target, donor, **options):
    return align(Checkpoint.open(target), Checkpoint.open(donor), **options)


def edited(folder, tmp_path, change=None, **config):
    """A copy of a checkpoint with other tensors or another config."""
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    if change:
        tensors = load_file(file)
        save_file({k: v.contiguous() for k, v in change(tensors).items()}, file)
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**content, **config}))
    return copy


@pytest.fixture
def qwen(checkpoints):
    return checkpoints("qwen2_vl")


@pytest.fixture
def onevision(checkpoints):
    return checkpoints("llava_onevision")


@pytest.mark.parametrize("name", sorted(tiny_models.FAMILIES))
def test_every_layout_is_recognised(name, checkpoints):
    checkpoint = Checkpoint.open(checkpoints(name))
    slots = slot_map(checkpoint.tensors, name)
    expected = {"qwen2": "plain", "llama": "plain", "qwen2_vl": "plain", "qwen2_5_vl": "plain"}
    expected["qwen2_5_omni_thinker"] = "thinker"
    assert slots.layout.name == expected.get(name, "hf_nested")
    assert slots.layer_count == 2
    assert "llm.layers.1.attn.q.weight" in slots.by_slot
    assert not any(s.startswith("other.") for s in slots.by_slot), "a prefix has no component"


@pytest.mark.parametrize("name", sorted(tiny_models.FAMILIES))
def test_disk_names_find_their_places_in_memory(name, checkpoints):
    checkpoint = Checkpoint.open(checkpoints(name))
    model = tiny_models.load(name, checkpoint.folder)
    state = model.state_dict()
    found = memory_names(checkpoint, list(state))
    assert set(found) == set(checkpoint.tensors)
    for disk, memory in found.items():
        assert torch.equal(checkpoint.read_tensor(disk), state[memory]), (disk, memory)


def test_original_and_v5_namings_are_recognised(checkpoints):
    for naming, layout in (("original", "llava_original"), ("v5", "hf_v5")):
        checkpoint = Checkpoint.open(checkpoints("llava_onevision", naming=naming))
        slots = slot_map(checkpoint.tensors, naming)
        assert slots.layout.name == layout
    published = slot_map(Checkpoint.open(checkpoints("llava_onevision")).tensors, "published")
    assert set(slots.by_slot) == set(published.by_slot)


def test_every_tensor_of_both_sides_is_accounted_for(qwen, onevision):
    found = aligned(qwen, onevision).to_dict()
    target, donor = Checkpoint.open(qwen), Checkpoint.open(onevision)
    merged = [m["target"] for m in found["merged"]]
    kept = [k["target"] for k in found["kept"]]
    used = {s for m in found["merged"] for s in m["sources"]}
    unused = {u["source"] for u in found["unused"]}
    assert sorted(merged + kept) == sorted(target.tensors)
    assert used | unused == set(donor.tensors)
    assert not used & unused
    assert found["mergeable"] and found["reasons"] == []
    assert len(merged) == 2 * 12 + 3  # per layer 7 matrices, 3 biases, 2 norms; embed, norm, head
    assert 0.9 < found["ancestor"]["cosine_min"] <= found["ancestor"]["cosine_median"] <= 1


def test_the_account_is_checked(qwen, onevision):
    alignment = aligned(qwen, onevision)
    lost = alignment.merged.pop()
    with pytest.raises(LayoutError, match="does not add up"):
        alignment.check_accounting()
    alignment.kept[lost.target] = "by hand"
    with pytest.raises(LayoutError, match="does not add up"):
        alignment.check_accounting()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 64}, "hidden size differs: target 32, donor 64"),
        ({"num_hidden_layers": 3}, "layer count differs: target 2, donor 3"),
        ({"num_attention_heads": 8}, "number of heads differs: target 4, donor 8"),
        ({"num_key_value_heads": 4}, "number of key/value heads differs: target 2, donor 4"),
        ({"intermediate_size": 96}, "MLP size differs: target 64, donor 96"),
        ({"hidden_act": "gelu"}, "activation differs: target silu, donor gelu"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "RoPE base differs: target 1000000.0, donor 10000.0",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_geometry_is_refused(changes, reason, qwen, checkpoints):
    alignment = aligned(qwen, tiny_save(checkpoints, changes))
    way_out = "; models that can be merged are fine-tunes of one LLM"
    way_out += "; go on all the same with --force geometry"
    assert f"{reason}{way_out}" in alignment.reasons()
    assert not alignment.to_dict()["mergeable"]


def tiny_save(checkpoints, changes):
    """`checkpoints` needs hashable changes; geometry changes are built apart."""
    hashable = {k: v for k, v in changes.items() if not isinstance(v, dict)}
    if hashable == changes:
        return checkpoints("llava_onevision", **changes)
    folder = checkpoints("llava_onevision", own="rope")
    content = json.loads((folder / "config.json").read_text())
    content["text_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_a_foreign_ancestor_is_refused_and_can_be_forced(qwen, checkpoints):
    alignment = aligned(qwen, checkpoints("llava_onevision", ancestor="foreign"))
    (reason,) = alignment.reasons()
    assert "share no ancestor" in reason and "--force ancestor" in reason
    assert abs(alignment.ancestor.median) < 0.1
    assert alignment.reasons(force=["ancestor"]) == []


def test_a_swapped_matrix_is_refused(qwen, onevision, tmp_path):
    def swap(tensors):
        gate, up = (f"language_model.model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up"))
        return {**tensors, gate: tensors[up].clone(), up: tensors[gate].clone()}

    alignment = aligned(qwen, edited(onevision, tmp_path, swap))
    (reason,) = alignment.reasons()
    assert "layers.1.mlp." in reason and "swapped" in reason


def test_other_vocabularies_keep_embedding_and_head(qwen, checkpoints):
    alignment = aligned(qwen, checkpoints("llava_onevision", vocab_size=90))
    assert alignment.reasons() == []
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert alignment.kept[name] == "vocabularies differ: target 96 rows, donor 90"


def test_other_token_ids_keep_embedding_and_head(qwen, onevision, tmp_path):
    def tokenizer(folder, vocabulary):
        content = {"model": {"vocab": vocabulary}, "added_tokens": [{"content": "<x>", "id": 9}]}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    ours = tmp_path / "ours"
    shutil.copytree(qwen, ours)
    theirs = edited(onevision, tmp_path)
    tokenizer(ours, {"a": 0, "b": 1})
    same = aligned(ours, tokenizer(theirs, {"b": 1, "a": 0}))
    assert "lm_head.weight" not in same.kept
    other = aligned(ours, tokenizer(theirs, {"a": 1, "b": 0}))
    assert other.kept["lm_head.weight"] == (
        "vocabularies differ: 2 tokens have other ids, such as 'a' (0 in the target, 1 in the "
        "donor)"
    )


def test_wrong_words_are_refused(qwen, onevision):
    with pytest.raises(RecipeError, match="did you mean 'language_model'"):
        aligned(qwen, onevision, select="langage_model")
    with pytest.raises(RecipeError, match="vocabulary: 'union'"):
        aligned(qwen, onevision, vocabulary="union")


def test_tokenizers_that_cannot_be_compared_are_noted(qwen, onevision):
    (note,) = aligned(qwen, onevision).notes
    assert note.startswith("the tokenizers could not be compared")


def test_vocabulary_target_keeps_embedding_and_head(qwen, onevision):
    alignment = aligned(qwen, onevision, vocabulary="target")
    assert alignment.kept["lm_head.weight"] == "vocabulary: target"


def test_a_tied_donor_lends_its_embedding_to_the_head(qwen, checkpoints):
    donor = checkpoints("qwen2", tie_word_embeddings=True)
    alignment = aligned(qwen, donor)  # whose head is unlike the donor's embedding
    assert "unlike this one" in alignment.kept["lm_head.weight"]
    alignment = aligned(qwen, donor, ancestor=False)
    (head,) = [m for m in alignment.merged if m.target == "lm_head.weight"]
    assert (head.sources, head.op) == (("model.embed_tokens.weight",), "tied")


def test_a_tied_target_gets_no_head(checkpoints, onevision):
    alignment = aligned(checkpoints("qwen2", tie_word_embeddings=True), onevision)
    why = alignment.unused["language_model.lm_head.weight"]
    assert why == "the target ties its head to the embedding"
    assert "lm_head.weight" not in alignment.kept


def test_biases_without_a_place_are_reported(checkpoints):
    # Llama has no q/k/v biases; RoPE bases are made equal so that only the biases differ.
    llama = checkpoints("llama", rope_theta=1e6)
    alignment = aligned(llama, checkpoints("qwen2"), ancestor=False)
    why = alignment.unused["model.layers.0.self_attn.q_proj.bias"]
    assert why == "the target has no such tensor"
    (note,) = [note for note in alignment.notes if "go nowhere" in note]
    assert note.startswith("6 tensors of the donor") and "k_proj.bias" in note
    assert alignment.reasons() == []


@pytest.mark.parametrize("role", ["target", "donor"])
def test_a_language_model_that_matches_in_part_is_refused(role, qwen, onevision, tmp_path):
    def rename(tensors):
        return {n.replace("mlp.up_proj.", "mlp.up_proj.base_layer."): t for n, t in tensors.items()}

    if role == "donor":
        alignment = aligned(qwen, edited(onevision, tmp_path, rename))
    else:
        alignment = aligned(edited(qwen, tmp_path, rename), onevision)
    reasons = "; ".join(alignment.reasons())
    assert "2 matrices of the donor go nowhere" in reasons
    assert "2 matrices of the target get nothing" in reasons


def test_quantised_weights_are_refused(qwen, onevision, tmp_path):
    config = edited(onevision, tmp_path, quantization_config={"quant_method": "fp8"})
    (reason,) = aligned(qwen, config).reasons()
    assert "donor's weights are quantised (quantization_config" in reason
    shutil.rmtree(config)
    scale = "language_model.model.layers.0.mlp.up_proj.weight_scale"
    packed = edited(onevision, tmp_path, lambda t: {**t, scale: torch.ones(1)})
    assert f"tensor '{scale}'" in "; ".join(aligned(qwen, packed).reasons())


def test_force_geometry_does_not_waive_the_ancestor_test(qwen, checkpoints, tmp_path):
    foreign = edited(checkpoints("llava_onevision", ancestor="foreign"), tmp_path)
    content = json.loads((foreign / "config.json").read_text())
    content["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    (foreign / "config.json").write_text(json.dumps(content))
    alignment = aligned(qwen, foreign)
    assert len(alignment.reasons()) == 2  # both at once
    (left,) = alignment.reasons(force=["geometry"])
    assert "share no ancestor" in left


def test_a_component_without_a_common_ancestor_is_kept(checkpoints, tmp_path):
    def foreign(tensors):
        generator = torch.Generator().manual_seed(1)
        return {
            n: torch.randn(t.shape, generator=generator) if n.startswith("visual.blocks") else t
            for n, t in tensors.items()
        }

    other = edited(checkpoints("qwen2_vl", own="second"), tmp_path, foreign)
    alignment = aligned(checkpoints("qwen2_vl"), other, select="all")
    assert alignment.reasons() == []
    assert set(alignment.kept.values()) == {"vision parts share no ancestor"}
    assert any(m.slot.startswith("projector.") for m in alignment.merged)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, True),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}, False),
    ],
    ids=["linear", "dynamic"],
)
def test_rope_scaling(text, refused, qwen, onevision, tmp_path):
    donor = edited(onevision, tmp_path)
    content = json.loads((donor / "config.json").read_text())
    content["text_config"]["rope_parameters"] = text
    (donor / "config.json").write_text(json.dumps(content))
    reasons = [reason.partition(";")[0] for reason in aligned(qwen, donor).reasons()]
    expected = ["RoPE scaling differs: target none, donor linear 8.0"] if refused else []
    assert reasons == expected


def test_swish_is_silu_and_null_is_left_out(qwen, onevision, tmp_path):
    donor = edited(onevision, tmp_path)
    content = json.loads((donor / "config.json").read_text())
    content["text_config"] |= {"hidden_act": "swish", "head_dim": None}
    (donor / "config.json").write_text(json.dumps(content))
    assert aligned(qwen, donor).reasons() == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", "4"),
        ("num_attention_heads", [4]),
        ("head_dim", "8"),
        ("rope_theta", "abc"),
        ("intermediate_size", -1),
    ],
)
def test_impossible_configs_are_named(key, value, tmp_path, checkpoints):
    folder = edited(checkpoints("qwen2"), tmp_path, **{key: value})
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if key == "intermediate_size":  # read from the config only where no shape tells it
        tensors = {n: t for n, t in tensors.items() if "gate_proj" not in n}
        save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"config.json: {key} is .*which cannot be"):
        aligned(folder, folder, ancestor=False)


@pytest.mark.parametrize("value", [[1], 5, "x"])
def test_impossible_nested_configs_are_named(value, onevision, tmp_path):
    folder = edited(onevision, tmp_path, text_config=value)
    with pytest.raises(CheckpointError, match="text_config is"):
        aligned(folder, folder)


def test_a_tied_head_that_is_stored_as_a_copy_follows_the_embedding(checkpoints, tmp_path, qwen):
    def copy(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    target = edited(checkpoints("qwen2", tie_word_embeddings=True), tmp_path, copy)
    alignment = aligned(target, qwen)
    sources = {m.target: m.sources for m in alignment.merged}
    assert sources["lm_head.weight"] == sources["model.embed_tokens.weight"]
    assert alignment.unused["lm_head.weight"] == "the target ties its head to the embedding"


def test_select_linear_takes_the_matrices_of_the_layers_only(qwen, onevision):
    alignment = aligned(qwen, onevision, select="linear")
    assert len(alignment.merged) == 2 * 7
    assert all(len(Checkpoint.open(qwen).meta(m.target).shape) == 2 for m in alignment.merged)


def test_select_all_merges_other_components_only_if_they_are_the_same(qwen, checkpoints):
    same = aligned(qwen, checkpoints("qwen2_vl", own="second"), select="all")
    assert same.kept == {} and same.unused == {}
    other = aligned(qwen, checkpoints("qwen2_5_vl"), select="all")
    assert set(other.kept.values()) == {
        "vision parts have other structures",
        "projector parts have other structures",
    }


def test_unknown_names_are_refused_with_the_known_layouts(tmp_path):
    save_file({"blocks.0.w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LayoutError, match=r"fit no known layout.*hf_nested"):
        slot_map(Checkpoint.open(tmp_path).tensors, "it")


def test_a_gap_in_the_layers_is_no_layout(qwen):
    names = [n for n in Checkpoint.open(qwen).tensors if ".layers.0." not in n]
    with pytest.raises(LayoutError, match=r"it lacks layers of its language model: model.layers.0"):
        slot_map(names, "it")


def test_heads_and_rope_base_that_a_config_leaves_out_come_from_the_class(checkpoints, tmp_path):
    # LLaVA-1.5's published config.json: its text_config leaves out what equals Llama's defaults.
    def published(content):
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters"):
            content["text_config"].pop(key, None)
        return content

    folder = tmp_path / "llava"
    shutil.copytree(checkpoints("llava"), folder)
    content = published(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(content))
    from omnimerge.arch import geometry

    checkpoint = Checkpoint.open(folder)
    found = geometry(checkpoint, slot_map(checkpoint.tensors, "it"))
    assert found.rope_theta == 10_000
    assert found.heads == 32  # Llama's default, as in LLaVA-1.5-7B
    assert found.head_dim == 1  # 32 rows of the query for 32 heads


@settings(max_examples=100, deadline=None)
@given(
    layout=st.sampled_from(layouts()),
    layer=st.integers(0, 200),
    inner=st.sampled_from(["attn.q", "attn.o", "mlp.gate", "mlp.down", "input_norm"]),
    leaf=st.sampled_from(["weight", "bias"]),
)
def test_slots_invert(layout, layer, inner, leaf):
    disk, entry = next((n, e) for n, e in layout.block.items() if inner in e.slots)
    name = f"{layout.layers.replace('{i}', str(layer))}{disk}.{leaf}"
    branch = f"@{entry.branch}" if entry.branch else ""
    slot = layout.slots([name], {layer: layer})[name]
    assert slot == f"llm.layers.{layer}.{'+'.join(entry.slots)}.{leaf}{branch}"
