"""Inferred layouts: what names, shapes and cosines tell, and what stays open."""

import json
import re
import warnings

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from omnimerge.arch import align, layouts, slot_map
from omnimerge.arch.family import Entry, Layout
from omnimerge.arch.inference import infer_layout, require_sure
from omnimerge.arch.inference.words import entry_by_name, is_foreign
from omnimerge.arch.layout_file import parse_layouts
from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import LayoutError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tiny_multimodal

torch.set_num_threads(1)

QKV = ("attn.q", "attn.k", "attn.v")
TABLES = {layout.name: layout for layout in layouts()}


def one(slot, branch=""):
    return Entry((slot,), "rename", branch)


# An invented layout: nothing but its norms has a name that tells.
INVENTED = Layout(
    name="invented",
    about="invented, inferred",
    layers="brain.stages.{i}.",
    embed="brain.tok_embeddings",
    norm="brain.ln_f",
    head="output",
    block={
        "norm1": one("input_norm"),
        "alpha.mat_a": Entry(QKV, "concat"),
        "alpha.mat_b": one("attn.o"),
        "norm2": one("post_attention_norm"),
        "beta.w1": one("mlp.up"),
        "beta.w2": one("mlp.gate"),
        "beta.w3": one("mlp.down"),
    },
)


def with_block(**changes):
    """The invented layout with other entries; None drops one."""
    block = {**INVENTED.block, **{name.replace("__", "."): e for name, e in changes.items()}}
    return Layout(**{**vars(INVENTED), "block": {k: e for k, e in block.items() if e}})


def rewrite(source, folder, layout, *, kv_heads=2, change=None):
    """Write a checkpoint's language model in another layout; copies for images get noise."""
    slots = slot_map(load_file(source / "model.safetensors"), "source")
    tensors = load_file(source / "model.safetensors")
    by_slot = {slot: tensors[name] for slot, name in slots.by_slot.items()}
    written = {n: t for n, t in tensors.items() if not slots.by_name[n].startswith("llm.")}
    for end in ("embed", "norm", "head"):
        written[f"{getattr(layout, end)}.weight"] = by_slot[f"llm.{end}.weight"]
    for i in range(slots.layer_count):
        for name, entry in layout.block.items():
            parts = [by_slot[f"llm.layers.{i}.{slot}.weight"] for slot in entry.slots]
            if entry.op == "grouped":
                parts = [
                    p
                    for group in zip(*(t.chunk(kv_heads) for t in parts), strict=True)
                    for p in group
                ]
            tensor = torch.cat(parts)
            if entry.branch == "vision":
                generator = torch.Generator().manual_seed(i)
                tensor = tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
            written[f"{layout.layers.replace('{i}', str(i))}{name}.weight"] = tensor
    folder.mkdir()
    written = change(written) if change else written
    save_file({n: t.contiguous().clone() for n, t in written.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return Checkpoint.open(folder)


@pytest.fixture
def llava(checkpoints):
    return checkpoints("llava")


@pytest.fixture
def sibling(checkpoints):
    """Another model over the same LLM, whose layout is known: its cosine with `llava` is 0.99."""
    return Checkpoint.open(checkpoints("llama"))


def opened(inferred):
    return {choice.what: choice for choice in inferred.open_choices()}


# --- every model type of tiny_multimodal, without the tables ---------------------------------


@pytest.fixture(scope="session")
def multimodal(tmp_path_factory):
    """A function: model type -> its tiny checkpoint, saved when first asked for."""
    root = tmp_path_factory.mktemp("infer")
    saved = {}

    def get(model_type):
        if model_type not in saved:
            saved[model_type] = tiny_multimodal.save(model_type, root / model_type)
        return Checkpoint.open(saved[model_type])

    return get


# Prefix, embedding, norm and head, where no table knows the type.
NO_TABLE = {
    "blip-2": (  # OPT; its position embedding is taller than its vocabulary
        "language_model.model.decoder.layers.{i}.",
        "language_model.model.decoder.embed_tokens",
        "language_model.model.decoder.final_layer_norm",
        "lm_head",
    ),
    "emu3": (
        "text_model.model.layers.{i}.",
        "text_model.model.embed_tokens",
        "text_model.model.norm",
        "text_model.lm_head",
    ),
    "fuyu": (
        "language_model.model.layers.{i}.",
        "language_model.model.embed_tokens",
        "language_model.model.final_layernorm",
        "language_model.lm_head",
    ),
    "lfm2_vl": (  # its final norm is called embedding_norm
        "model.language_model.layers.{i}.",
        "model.language_model.embed_tokens",
        "model.language_model.embedding_norm",
        "lm_head",
    ),
}
# What the tables do not know, and names and shapes tell.
MORE = {
    "glm4v": {"mlp.gate_up_proj": Entry(("mlp.gate", "mlp.up"), "concat")},
    "llama4": {f"feed_forward.{each}_proj": one(f"mlp.{each}") for each in ("gate", "up", "down")},
}
OPEN = {
    # Its queries come with an output gate, so that the matrix has twice the rows of the heads.
    "qwen3_5": {"self_attn.q_proj"},
    # Whether w1 or w3 is the gate, neither names nor shapes tell.
    "lfm2_vl": {"feed_forward.w1", "feed_forward.w3"},
    # Persimmon's query_key_value is interleaved by head, CogVLM's of the same name is not.
    "fuyu": {"self_attn.query_key_value"},
}


@pytest.mark.parametrize("model_type", sorted(tiny_multimodal.BUILDERS))
def test_names_and_shapes_are_enough_for_published_types(model_type, multimodal):
    checkpoint = multimodal(model_type)
    inferred = infer_layout(checkpoint)
    found = inferred.layout
    if model_type in NO_TABLE:
        table, block = NO_TABLE[model_type], found.block
    else:
        known = slot_map(checkpoint.tensors, model_type).layout
        table = (known.layers, known.embed, known.norm, known.head)
        inner = {choice.what for choice in inferred.choices} - OPEN.get(model_type, set())
        block = {name: entry for name, entry in known.block.items() if name in inner}
        assert found.inserted == (known.inserted if model_type == "mllama" else "")
    assert (found.layers, found.embed, found.norm) == table[:3]
    untied = f"{table[3]}.weight" in checkpoint.tensors
    head = next(choice for choice in inferred.choices if choice.what == "head")
    assert head.chosen == (table[3] if untied else "")
    assert found.block == {**block, **MORE.get(model_type, {})}
    assert set(opened(inferred)) == OPEN.get(model_type, set())
    assert all(choice.margin is None for choice in inferred.choices)
    assert found.slots(list(checkpoint.tensors))[f"{found.embed}.weight"] == "llm.embed.weight"
    assert parse_layouts(yaml.safe_load(inferred.text), "text", "text") == (found,)


def test_the_exceptions_are_few():
    assert len(tiny_multimodal.BUILDERS) >= 46
    exceptions = {*NO_TABLE, *MORE, *OPEN}
    assert exceptions < set(tiny_multimodal.BUILDERS) and len(exceptions) == 7


def test_names_of_families_without_a_table(multimodal):
    block = infer_layout(multimodal("blip-2")).layout.block
    assert block == {
        "self_attn_layer_norm": one("input_norm"),
        "self_attn.q_proj": one("attn.q"),
        "self_attn.k_proj": one("attn.k"),
        "self_attn.v_proj": one("attn.v"),
        "self_attn.out_proj": one("attn.o"),
        "final_layer_norm": one("post_attention_norm"),
        "fc1": one("mlp.up"),
        "fc2": one("mlp.down"),
    }
    lfm2 = infer_layout(multimodal("lfm2_vl"))
    assert lfm2.layout.block["feed_forward.w2"] == one("mlp.down")
    assert lfm2.layout.block["operator_norm"] == one("input_norm")
    by = {choice.what: choice.by for choice in lfm2.choices}
    assert by["feed_forward.w2"] == "shape" and by["self_attn.q_proj"] == "name"


# --- an invented layout, with a sibling --------------------------------------------------------


@pytest.mark.parametrize(
    "qkv",
    [
        Entry(QKV, "concat"),
        Entry(QKV, "grouped"),
        Entry(("attn.k", "attn.v", "attn.q"), "concat"),
    ],
    ids=["concat", "grouped", "other order"],
)
def test_a_sibling_tells_what_names_do_not(qkv, llava, sibling, tmp_path):
    layout = with_block(alpha__mat_a=qkv)
    checkpoint = rewrite(llava, tmp_path / "invented", layout)
    inferred = infer_layout(checkpoint, sibling)
    require_sure(inferred, "invented")
    assert inferred.layout == layout
    by = {choice.what: choice for choice in inferred.choices}
    for name in ("alpha.mat_a", "alpha.mat_b", "beta.w1", "beta.w2"):
        assert by[name].by == "cosine"
        assert by[name].margin > 0.4, by[name]
        assert by[name].candidates[0][1] > 0.98
    assert by["beta.w3"].by == "shape" and by["beta.w3"].margin is None
    assert by["beta.w3"].candidates[0][1] > 0.98  # and its cosine agrees
    assert by["norm1"].by == by["embed"].by == by["head"].by == "name"
    assert parse_layouts(yaml.safe_load(inferred.text), "text", "text") == (inferred.layout,)


def test_the_inferred_layout_aligns_the_checkpoint(llava, sibling, tmp_path):
    checkpoint = rewrite(
        llava, tmp_path / "invented", with_block(alpha__mat_a=Entry(QKV, "grouped"))
    )
    layout = infer_layout(checkpoint, sibling).layout
    with pytest.raises(LayoutError, match="fit no known layout"):
        slot_map(checkpoint.tensors, "invented")
    alignment = align(checkpoint, sibling, layouts=[layout])
    assert alignment.reasons() == []
    assert alignment.to_dict()["ancestor"]["cosine_min"] > 0.98
    assert len(alignment.merged) == 2 * 7 + 3  # per layer 5 matrices and 2 norms; the ends
    assert slot_map(checkpoint.tensors, "invented", [layout]).layout is layout


def test_without_a_sibling_the_choice_is_open(llava, tmp_path):
    checkpoint = rewrite(llava, tmp_path / "invented", INVENTED)
    inferred = infer_layout(checkpoint)
    found = opened(inferred)
    assert set(found) == {"alpha.mat_a", "alpha.mat_b", "beta.w1", "beta.w2"}
    assert [name for name, _ in found["alpha.mat_b"].candidates] == [
        "attn.q",
        "attn.o",
        "attn.k+attn.v concat",
        "attn.v+attn.k concat",
    ]
    assert set(inferred.layout.block) == {"norm1", "norm2", "beta.w3"}
    assert "  # UNDECIDED: alpha.mat_b is attn.q or attn.o or attn.k+attn.v concat" in inferred.text
    with pytest.raises(LayoutError) as error:
        require_sure(inferred, "models/x")
    message = str(error.value)
    assert message.startswith(
        "the layout of models/x cannot be inferred for certain: alpha.mat_a is"
    )
    assert all(name in message for name in found)
    assert "give --layout FILE with these lines filled in (`omnimerge layout models/x`" in message
    # What is open keeps its own words: it cannot be merged with anything by mistake.
    slots = slot_map(checkpoint.tensors, "x", [inferred.layout])
    assert slots.by_name["brain.stages.1.beta.w1.weight"] == "llm.layers.1.beta.w1.weight"


def test_a_foreign_model_decides_nothing(llava, checkpoints, tmp_path):
    checkpoint = rewrite(llava, tmp_path / "invented", INVENTED)
    foreign = Checkpoint.open(checkpoints("llama", ancestor="foreign"))
    inferred = infer_layout(checkpoint, foreign)
    assert set(opened(inferred)) == {"alpha.mat_a", "alpha.mat_b", "beta.w1", "beta.w2"}
    assert all(abs(c.candidates[0][1]) < 0.2 for c in opened(inferred).values())
    with pytest.raises(
        LayoutError, match=r"beta.w1 is .* \(cosine -?0.\d\d against -?0.\d\d\); beta"
    ):
        require_sure(inferred, "x")
    assert infer_layout(checkpoint, foreign, margin=0.0).open_choices() == ()


def test_four_squares_of_one_shape(checkpoints, tmp_path):
    """Where every head has keys of its own, four matrices have one shape."""
    source = checkpoints("llava", num_key_value_heads=4)
    names = {"a": one("attn.v"), "b": one("attn.o"), "c": one("attn.q"), "d": one("attn.k")}
    layout = with_block(alpha__mat_a=None, alpha__mat_b=None, **names)
    checkpoint = rewrite(source, tmp_path / "invented", layout)
    sibling = Checkpoint.open(checkpoints("llama", num_key_value_heads=4))
    inferred = infer_layout(checkpoint, sibling)
    assert inferred.layout == layout
    margins = [choice.margin for choice in inferred.choices if choice.what in names]
    assert len(margins) == 4 and min(margins) > 0.5
    assert {"a", "b", "c", "d"} < set(opened(infer_layout(checkpoint)))


def test_a_tensor_beside_the_slots_keeps_its_words(llava, sibling, tmp_path):
    """An additional matrix of a slot's shape is no copy of it: its cosine with all of them is 0."""

    def add(tensors):
        for i in range(2):
            generator = torch.Generator().manual_seed(i)
            tensors[f"brain.stages.{i}.alpha.extra.weight"] = torch.randn(
                32, 32, generator=generator
            )
        return tensors

    checkpoint = rewrite(llava, tmp_path / "invented", INVENTED, change=add)
    inferred = infer_layout(checkpoint, sibling)
    require_sure(inferred, "x")
    assert inferred.layout == INVENTED
    extra = next(choice for choice in inferred.choices if choice.what == "alpha.extra")
    assert (extra.chosen, extra.by, extra.sure) == ("", "cosine", True)
    assert "# alpha.extra keeps its own words: it resembles no slot" in inferred.text


# --- the words ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("self_attn.q_proj", one("attn.q")),
        ("attention.wo", one("attn.o")),
        ("attn.c_proj", one("attn.o")),
        ("mlp.c_proj", one("mlp.down")),
        ("self_attention.dense", one("attn.o")),
        ("attn.Wqkv", Entry(QKV, "concat")),
        ("self_attn.qkv_proj.base_layer", Entry(QKV, "concat")),
        ("mlp.gate", one("mlp.gate")),
        ("ln_1", one("input_norm")),
        ("feed_forward.w1", None),  # the gate of Llama, the up projection of Qwen
        ("attention.wqkv", None),  # interleaved in InternLM2, not in others
        ("self_attn.query_key_value", None),
        ("dense", None),
        ("self_attn.my_q_proj", None),  # words match as a whole
        ("7", None),
    ],
)
def test_words_match_as_a_whole_and_only_where_they_mean_one_thing(name, entry):
    assert entry_by_name(name) == entry


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        ("model.layers.", False),
        ("language_model.model.layers.", False),
        ("vision_language_model.layers.", False),
        ("llm.decoder.block.", False),
        ("revised.invites.", False),
        ("encoder.layers.", False),
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.", True),
        ("language_model.vision_adapter.layers.", True),
        ("model.visual_abstractor.encoder.layers.", True),
        ("model.connector.perceiver_resampler.layers.", True),
        ("thinker.audio_tower.layers.", True),
        ("talker.model.layers.", True),
        ("vpm.encoder.layers.", True),
        ("qformer.encoder.layer.", True),
    ],
)
def test_words_tell_other_models_apart(name, foreign):
    assert is_foreign(name) is foreign


# --- names and weights that contradict each other ----------------------------------------------


def test_a_sibling_contradicts_swapped_names(llava, sibling, tmp_path):
    swapped = with_block(
        beta__w1=None, beta__w2=None, beta__gate_proj=one("mlp.up"), beta__up_proj=one("mlp.gate")
    )
    checkpoint = rewrite(llava, tmp_path / "swapped", swapped)
    inferred = infer_layout(checkpoint, sibling)
    assert set(opened(inferred)) == {"beta.gate_proj", "beta.up_proj"}
    reason = opened(inferred)["beta.gate_proj"].reason
    assert re.fullmatch(
        r"is mlp.gate by its name, but resembles mlp.up \(cosine -?0.0\d against 0.99\)", reason
    )
    trusted = infer_layout(checkpoint)  # nothing contradicts the names without a sibling
    assert trusted.layout.block["beta.gate_proj"] == one("mlp.gate")


def test_a_shape_contradicts_a_name(llava, tmp_path):
    layout = with_block(beta__w3=None, beta__up_proj=one("mlp.down"))
    checkpoint = rewrite(llava, tmp_path / "wrong", layout)
    found = opened(infer_layout(checkpoint))["beta.up_proj"]
    assert (
        str(found) == "beta.up_proj is called mlp.up, but has the shape 32 × 64 instead of 64 × 32"
    )


def test_a_fused_tensor_in_another_order_than_its_name_says(llava, sibling, tmp_path):
    layout = with_block(alpha__mat_a=None, alpha__qkv_proj=Entry(QKV, "grouped"))
    checkpoint = rewrite(llava, tmp_path / "grouped", layout)
    found = opened(infer_layout(checkpoint, sibling))
    assert set(found) == {"alpha.qkv_proj"}
    assert "but resembles attn.q+attn.k+attn.v grouped" in str(found["alpha.qkv_proj"])


def test_what_fits_no_slot_is_asked_for_where_slots_are_missing(llava, tmp_path):
    checkpoint = rewrite(llava, tmp_path / "invented", INVENTED)
    file = checkpoint.folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= {"num_attention_heads": 4, "head_dim": 6}
    file.write_text(json.dumps(config))
    found = opened(infer_layout(Checkpoint.open(checkpoint.folder)))
    assert str(found["alpha.mat_b"]) == (
        "alpha.mat_b has a shape, 32 × 32, that fits no slot, while attn.q, attn.k, attn.v, attn.o "
        "have no tensor: check num_attention_heads and its like in config.json"
    )


# --- norms ---------------------------------------------------------------------------------------


def test_norms_without_a_name_are_open(llava, sibling, tmp_path):
    layout = with_block(norm1=None, norm2=None, x=one("input_norm"), y=one("post_attention_norm"))
    checkpoint = rewrite(llava, tmp_path / "invented", layout)
    found = opened(infer_layout(checkpoint, sibling))
    assert set(found) == {"x", "y"}
    assert found["x"].candidates == (("input_norm", None), ("post_attention_norm", None))
    assert found["x"].margin is None and found["x"].by == "shape"


def test_the_last_norm_is_what_the_sibling_has_left(llava, sibling, tmp_path):
    layout = with_block(norm2=None, y=one("post_attention_norm"))
    checkpoint = rewrite(llava, tmp_path / "invented", layout)
    assert infer_layout(checkpoint, sibling).layout == layout
    alone = opened(infer_layout(checkpoint))["y"]  # Gemma's have four
    assert [name for name, _ in alone.candidates] == [
        "post_attention_norm",
        "pre_feedforward_norm",
        "post_feedforward_norm",
        "attn.q_norm",  # over all heads
    ]


# --- branches ------------------------------------------------------------------------------------

COGVLM = TABLES["cogvlm"]
MPLUG = TABLES["mplug_owl2"]


def present(layout, inferred):
    names = {choice.what for choice in inferred.choices}
    return {name: entry for name, entry in layout.block.items() if name in names}


def test_words_tell_branches_and_a_sibling_the_order(llava, sibling, tmp_path):
    checkpoint = rewrite(llava, tmp_path / "cogvlm", COGVLM)
    alone = infer_layout(checkpoint)
    qkv = {f"self_attn.{each}_expert_query_key_value" for each in ("language", "vision")}
    assert set(opened(alone)) == qkv
    assert alone.layout.block == {
        name: entry for name, entry in present(COGVLM, alone).items() if name not in qkv
    }
    compared = infer_layout(checkpoint, sibling)
    require_sure(compared, "cogvlm")
    assert compared.layout.block == dict(COGVLM.block)
    assert parse_layouts(yaml.safe_load(compared.text), "text", "text") == (compared.layout,)
    assert (
        "  self_attn.vision_expert_query_key_value: "
        "{concat: [attn.q, attn.k, attn.v], branch: vision}   # by cosine: 0.9"
    ) in compared.text


def test_a_copy_for_images_is_compared_too(llava, sibling, tmp_path):
    names = {"beta__up_proj": one("mlp.up", "text"), "beta__gate_proj": one("mlp.gate", "text")}
    swapped = {
        "beta__vision_up_proj": one("mlp.gate", "vision"),
        "beta__vision_gate_proj": one("mlp.up", "vision"),
    }
    layout = with_block(beta__w1=None, beta__w2=None, **names, **swapped)
    inferred = infer_layout(rewrite(llava, tmp_path / "invented", layout), sibling)
    assert inferred.layout.block["beta.up_proj"] == one("mlp.up", "text")
    assert set(opened(inferred)) == {"beta.vision_up_proj", "beta.vision_gate_proj"}


def test_numbers_tell_no_branch(llava, sibling, checkpoints, tmp_path):
    """Which of multiway.0 and multiway.1 is for text, only a sibling with both can tell."""
    checkpoint = rewrite(llava, tmp_path / "mplug", MPLUG)
    copies = {name for name, entry in MPLUG.block.items() if entry.branch}
    for other in (None, sibling):
        inferred = infer_layout(checkpoint, other)
        assert set(opened(inferred)) == copies
        assert set(inferred.layout.block) == set(MPLUG.block) - copies
    found = opened(infer_layout(checkpoint))["self_attn.k_proj.multiway.0"]
    assert found.between == "attn.k@text or attn.k@vision"

    def part(tensors):
        return {
            name: torch.randn(t.shape, generator=torch.Generator().manual_seed(7))
            if name.endswith("_proj.multiway.1.weight")
            else t
            for name, t in tensors.items()
        }

    ours = rewrite(llava, tmp_path / "ours", MPLUG, change=part)
    theirs = rewrite(sibling.folder, tmp_path / "theirs", MPLUG, change=part)
    inferred = infer_layout(ours, theirs)
    norms = {name for name in copies if "norm" in name}
    assert set(opened(inferred)) == norms
    assert inferred.layout.block == {n: e for n, e in MPLUG.block.items() if n not in norms}


def test_a_copy_without_a_word_is_open(llava, sibling, tmp_path):
    layout = with_block(alpha__mat_a=None, qq=one("attn.q"), kk=one("attn.k"), vv=one("attn.v"))

    def double(tensors):
        copies = {n.replace(".qq.", ".q2."): t + 0.001 for n, t in tensors.items() if ".qq." in n}
        return {**tensors, **copies}

    checkpoint = rewrite(llava, tmp_path / "double", layout, change=double)
    inferred = infer_layout(checkpoint, sibling)
    assert set(opened(inferred)) == {"qq", "q2"}
    assert {"kk", "vv", "alpha.mat_b"} < set(inferred.layout.block)


# --- stacks and ends -----------------------------------------------------------------------------


def test_additions_are_the_checkpoints_own(llava, sibling, tmp_path):
    def adapt(tensors):
        for i in range(2):
            for kind, shape in (("lora_A", (4, 32)), ("lora_B", (32, 4))):
                tensors[f"brain.stages.{i}.alpha.mat_b.{kind}.image.weight"] = torch.zeros(shape)
        return tensors

    checkpoint = rewrite(llava, tmp_path / "invented", INVENTED, change=adapt)
    inferred = infer_layout(checkpoint, sibling)
    require_sure(inferred, "lora")
    assert inferred.layout == Layout(**{**vars(INVENTED), "own": ("lora_A", "lora_B")})
    assert "\nown: [lora_A, lora_B]   # " in inferred.text
    (read,) = parse_layouts(yaml.safe_load(inferred.text), "text", "text")
    assert read == inferred.layout
    slots = slot_map(checkpoint.tensors, "lora", [read])
    assert not any("lora" in slot and slot.startswith("llm.") for slot in slots.by_slot)


def test_cross_attention_beside_attention_is_own_and_instead_of_it_inserted(
    llava, multimodal, tmp_path
):
    assert infer_layout(multimodal("mllama")).layout.inserted == "cross_attn."

    def cross(tensors):
        for i in range(2):
            tensors[f"brain.stages.{i}.cross_attention.q_proj.weight"] = torch.zeros(32, 32)
        return tensors

    checkpoint = rewrite(llava, tmp_path / "cross", INVENTED, change=cross)
    layout = infer_layout(checkpoint).layout
    assert (layout.own, layout.inserted) == (("cross_attention",), "")


def test_embedding_and_head_without_names(llava, sibling, tmp_path):
    layout = Layout(**{**vars(INVENTED), "embed": "brain.ins", "head": "outs"})
    checkpoint = rewrite(llava, tmp_path / "invented", layout)
    inferred = infer_layout(checkpoint, sibling)
    assert inferred.layout == layout
    by = {choice.what: choice for choice in inferred.choices}
    assert by["embed"].by == by["head"].by == "cosine" and by["embed"].margin > 0.5
    named = Layout(**{**vars(INVENTED), "head": "outs"})
    checkpoint_2 = rewrite(llava, tmp_path / "named", named)
    head = next(choice for choice in infer_layout(checkpoint_2).choices if choice.what == "head")
    assert (head.chosen, head.by) == ("outs", "shape")
    alone = infer_layout(checkpoint)
    assert {"embed", "head"} < set(opened(alone))
    assert "# UNDECIDED: embed is brain.ins or outs" in alone.text
    assert "\nembed:" not in alone.text and "\nhead:" not in alone.text


def test_more_than_one_head_is_open_until_compared(llava, sibling, tmp_path):
    def add(tensors):
        generator = torch.Generator().manual_seed(0)
        return {**tensors, "more.weight": torch.randn(96, 32, generator=generator)}

    layout = Layout(**{**vars(INVENTED), "head": "outs"})
    checkpoint = rewrite(llava, tmp_path / "invented", layout, change=add)
    head = opened(infer_layout(checkpoint))["head"]
    assert {name for name, _ in head.candidates} == {"outs", "more"}
    compared = infer_layout(checkpoint, sibling)
    assert compared.open_choices() == () and compared.layout == layout


def test_a_list_of_modules_is_no_stack(llava, tmp_path):
    """The language model is the first of two modules; its own layers are the stack."""

    def number(tensors):
        return {
            f"0.{n}" if n.startswith(("brain", "output")) else f"1.{n}": t
            for n, t in tensors.items()
        }

    checkpoint = rewrite(llava, tmp_path / "list", INVENTED, change=number)
    layout = infer_layout(checkpoint).layout
    assert layout.layers == "0.brain.stages.{i}."
    assert (layout.embed, layout.head) == ("0.brain.tok_embeddings", "0.output")


def test_no_language_model_is_an_error(llava, tmp_path):
    def drop(*starts):
        return lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(starts)}

    no_stack = rewrite(llava, tmp_path / "a", INVENTED, change=drop("brain.stages"))
    with pytest.raises(
        LayoutError, match=r"no stack of layers, .* left out by their words: vision"
    ):
        infer_layout(no_stack)
    gap = rewrite(llava, tmp_path / "b", INVENTED, change=drop("brain.stages.0"))
    with pytest.raises(LayoutError, match="numbered from 0"):
        infer_layout(gap)
    no_embedding = rewrite(llava, tmp_path / "c", INVENTED, change=drop("brain.tok", "output"))
    with pytest.raises(LayoutError, match=r"no embedding: outside of brain.stages.\{i\}"):
        infer_layout(no_embedding)
    head_only = rewrite(llava, tmp_path / "e", INVENTED, change=drop("brain.tok"))
    with pytest.raises(LayoutError, match="no embedding"):
        infer_layout(head_only)
    no_norm = rewrite(llava, tmp_path / "d", INVENTED, change=drop("brain.ln_f"))
    assert "# UNDECIDED: norm is nowhere outside of the layers" in infer_layout(no_norm).text


def test_an_inferred_layout_does_not_take_other_checkpoints(llava, sibling, tmp_path):
    """With the ends of a known layout, a marker keeps it from fitting that layout's checkpoints."""
    plain = {"layers": "model.layers.{i}.", "embed": "model.embed_tokens", "norm": "model.norm"}
    layout = Layout(**{**vars(INVENTED), **plain, "head": "lm_head"})
    checkpoint = rewrite(llava, tmp_path / "plain", layout)
    found = infer_layout(checkpoint, sibling).layout
    assert found.marker == "model.layers.0.alpha.mat_a."
    assert slot_map(checkpoint.tensors, "x", [found]).layout is found
    assert slot_map(sibling.tensors, "x", [found]).layout.name == "plain"
