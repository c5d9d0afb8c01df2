"""Odd and hostile checkpoints: nothing is lost without a word, and nothing is run."""

from __future__ import annotations

import json

import llm_layouts as families
import pytest
import torch
from safetensors.torch import load_file, save_file

import omnimerge
from omnimerge.arch import layout_text, read_layouts, slots_of
from omnimerge.checkpoint import Checkpoint
from omnimerge.cli import main
from omnimerge.errors import CheckpointError, LayoutError

A, B, C = (families.decoder(own) for own in "abc")
ALPHA = 0.25


def merged(target, donors, out, *, force=(), **recipe):
    models = [str(d) for d in (donors if isinstance(donors, list) else [donors])]
    recipe = {"method": "adamms", "target": str(target), "models": models, **recipe}
    recipe.setdefault("parameters", {"alpha": ALPHA})
    plan = omnimerge.merge(recipe, out, force=force)
    with Checkpoint.open(out) as checkpoint:
        return plan, {name: checkpoint.read_tensor(name) for name in checkpoint.tensors}


def ids(prefix, count, start=0):
    return {f"{prefix}{i}": i for i in range(start, count)}


# --- vocabularies -------------------------------------------------------------------------------


def test_overlap_without_a_common_token_keeps_embedding_and_head(tmp_path):
    target = families.write(tmp_path / "t", families.llama(A), tokens=ids("a", 60))
    small = {**B, "embed": B["embed"][:40], "head": B["head"][:40]}
    donor = families.write(tmp_path / "d", families.llama(small), tokens=ids("b", 40))
    plan, got = merged(target, donor, tmp_path / "out", vocabulary="overlap")
    for name, key in (("model.embed_tokens.weight", "embed"), ("lm_head.weight", "head")):
        assert plan.alignments[0].kept[name] == "the tokenizers have no token in common"
        assert torch.equal(got[name], A[key])


def test_ids_beyond_the_rows_and_negative_ones_are_left_alone(tmp_path):
    tokens = {**ids("a", 60), "beyond": 99, "before": -3}
    target = families.write(tmp_path / "t", families.llama(A), tokens=tokens)
    donor = families.write(
        tmp_path / "d", families.llama(B), tokens={"a5": 5, "a6": 88, "beyond": 7, "before": 8}
    )
    _, got = merged(target, donor, tmp_path / "out", vocabulary="overlap")
    expected = A["head"].clone()
    expected[5] = (1 - ALPHA) * A["head"][5] + ALPHA * B["head"][5]
    torch.testing.assert_close(got["lm_head.weight"], expected)


def test_a_row_with_two_names_that_disagree_is_kept(tmp_path):
    target = families.write(tmp_path / "t", families.llama(A), tokens={"a5": 5, "dup": 5, "a6": 6})
    donor = families.write(tmp_path / "d", families.llama(B), tokens={"a5": 5, "dup": 3, "a6": 6})
    _, got = merged(target, donor, tmp_path / "out", vocabulary="overlap")
    assert torch.equal(got["lm_head.weight"][5], A["head"][5])
    torch.testing.assert_close(
        got["lm_head.weight"][6], (1 - ALPHA) * A["head"][6] + ALPHA * B["head"][6]
    )


def test_a_row_that_one_donor_lacks_still_gets_the_others(tmp_path):
    target = families.write(tmp_path / "t", families.llama(A), tokens=ids("a", 60))
    one = families.write(tmp_path / "1", families.llama(B), tokens=ids("a", 60))
    some = ids("a", 50) | ids("z", 60, start=50)
    two = families.write(tmp_path / "2", families.llama(C), tokens=some)
    _, got = merged(
        target, [one, two], tmp_path / "out", vocabulary="overlap", parameters={"alpha": 0.4}
    )
    head = got["lm_head.weight"]
    both = 0.6 * A["head"] + 0.2 * B["head"] + 0.2 * C["head"]
    alone = 0.6 * A["head"] + 0.2 * B["head"] + 0.2 * A["head"]
    torch.testing.assert_close(head[:50], both[:50])
    torch.testing.assert_close(head[50:], alone[50:])


def test_overlap_with_a_tied_donor_that_is_unlike_the_head(tmp_path):
    tied = {n: t for n, t in families.llama(B).items() if n != "lm_head.weight"}
    target = families.write(tmp_path / "t", families.llama(A), tokens=ids("a", 60))
    donor = families.write(tmp_path / "d", tied, tokens=ids("a", 60), tie_word_embeddings=True)
    alignment = omnimerge.align(target, donor, vocabulary="overlap")
    assert alignment.reasons() == []
    assert "unlike this one" in alignment.kept["lm_head.weight"]


def test_a_head_that_is_missing_is_not_taken_for_a_tied_one(tmp_path):
    headless = {n: t for n, t in families.llama(B).items() if n != "lm_head.weight"}
    target = families.write(tmp_path / "t", families.llama(A))
    donor = families.write(tmp_path / "d", headless)  # its config unties it
    alignment = omnimerge.align(target, donor)
    assert alignment.kept["lm_head.weight"] == "the donor has no such tensor"
    assert any("'lm_head.weight'" in note for note in alignment.notes)
    other = omnimerge.align(donor, target)
    assert other.unused["lm_head.weight"] == "the target has no such tensor"


def test_many_short_runs_are_put_back_quickly(tmp_path):
    import time

    took = {}
    for rows in (1_000, 4_000, 20_000):  # the first one imports and compiles
        at = tmp_path / str(rows)
        wide = {**A, "embed": torch.randn(rows, 32), "head": torch.randn(rows, 32)}
        target = families.write(at / "t", families.llama(wide), tokens=ids("a", rows))
        every_second = {name: i for name, i in ids("a", rows).items() if i % 2}
        donor = families.write(at / "d", families.llama(wide), tokens=every_second)
        tries = []
        for out in ("one", "two"):  # the faster one: the machine may have other work meanwhile
            start = time.perf_counter()
            _, got = merged(target, donor, at / out, vocabulary="overlap")
            tries.append(time.perf_counter() - start)
        took[rows] = min(tries)
        assert torch.equal(got["lm_head.weight"][::2], wide["head"][::2])
    assert took[20_000] < 6
    assert took[20_000] < 12 * took[4_000]  # 5 times the rows; squared it would be 25 times


# --- dtypes, quantised weights, zeros -----------------------------------------------------------


def test_matrices_of_integers_refuse_the_pair(tmp_path):
    packed = {
        n: (t * 20).to(torch.int8) if ".layers." in n and t.ndim == 2 else t
        for n, t in families.llama(B).items()
    }
    target = families.write(tmp_path / "t", families.llama(A))
    donor = families.write(tmp_path / "d", packed)
    reasons = omnimerge.align(target, donor).reasons()
    assert any(
        "21 matrices of the target get nothing" in r and "stored as I8" in r for r in reasons
    )


def test_double_precision_in_one_matrix_refuses_the_pair(tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"
    target = families.write(
        tmp_path / "t", {n: t.double() if n == name else t for n, t in families.llama(A).items()}
    )
    donor = families.write(tmp_path / "d", families.phi3(B))
    alignment = omnimerge.align(target, donor)
    reasons = "; ".join(alignment.reasons())
    assert "F64 is not merged" in reasons and name in reasons
    assert list(alignment.unused_parts) == ["llm.layers.1.attn.v.weight"]


def test_quantised_fused_matrices_are_told_as_such(tmp_path):
    tensors = families.phi3(B)
    fused = [n for n in tensors if "qkv_proj" in n or "gate_up_proj" in n]
    for name in fused:
        del tensors[name]
        stem = name.removesuffix("weight")
        tensors[f"{stem}qweight"] = torch.zeros(4, 96, dtype=torch.int32)
        tensors[f"{stem}qzeros"] = torch.zeros(1, 12, dtype=torch.int32)
        tensors[f"{stem}scales"] = torch.zeros(1, 96)
    target = families.write(tmp_path / "t", families.llama(A))
    donor = families.write(tmp_path / "d", tensors)
    reasons = omnimerge.align(target, donor).reasons()
    assert any("the donor's weights are quantised" in reason for reason in reasons)


@pytest.mark.parametrize("where", ["everywhere", "layers.1.mlp.up_proj"])
def test_zeros_where_the_other_has_weights_refuse_the_pair(where, tmp_path):
    tensors = families.llama(B)
    for name, tensor in tensors.items():
        if where == "everywhere" or where in name:
            tensors[name] = torch.zeros_like(tensor)
    target = families.write(tmp_path / "t", families.llama(A))
    donor = families.write(tmp_path / "d", tensors)
    (reason,) = omnimerge.align(target, donor).reasons()
    assert "zero on one side only" in reason and "--force ancestor" in reason


# --- the account of fused tensors ---------------------------------------------------------------


def test_a_slot_that_two_tensors_claim_is_refused_fused_or_not(tmp_path):
    tensors = families.llama(B)
    fused = torch.cat([B["0.gate"], B["0.up"]])
    first = {"model.layers.0.mlp.gate_up_proj.weight": fused, **tensors}
    donor = families.write(tmp_path / "d", first)
    target = families.write(tmp_path / "t", families.llama(A))
    for pair in ((target, donor), (donor, target)):
        with pytest.raises(LayoutError, match=r"are both 'llm.layers.0.mlp"):
            omnimerge.align(*pair)


def test_parts_that_go_nowhere_stay_in_the_account_when_forced(tmp_path):
    without = families.llama(A)
    del without["model.layers.1.self_attn.v_proj.weight"]
    target = families.write(tmp_path / "t", without)
    donor = families.write(tmp_path / "d", families.phi3(B))
    alignment = omnimerge.align(target, donor)
    slot = "llm.layers.1.attn.v.weight"
    assert alignment.unused_parts == {slot: "the target has no such tensor"}
    assert any(slot in reason for reason in alignment.reasons())
    plan, _ = merged(target, donor, tmp_path / "out", force=("accounting",))
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert manifest["alignments"][0]["unused_parts"] == alignment.unused_parts
    assert plan.alignments[0].to_dict()["unused_parts"][0]["slot"] == slot


def test_a_fused_target_that_lacks_a_part_says_so(tmp_path):
    without = families.llama(B)
    del without["model.layers.1.self_attn.v_proj.weight"]
    target = families.write(tmp_path / "t", families.phi3(A))
    donor = families.write(tmp_path / "d", without)
    alignment = omnimerge.align(target, donor)
    why = alignment.unused["model.layers.1.self_attn.q_proj.weight"]
    assert why.startswith("a part of the target's model.layers.1.self_attn.qkv_proj.weight is lost")
    _, got = merged(target, donor, tmp_path / "out", force=("accounting",))
    name = "model.layers.1.self_attn.qkv_proj.weight"
    assert torch.equal(got[name], families.phi3(A)[name])


def test_queries_and_keys_fused_with_values_apart(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "prefix: trunk.\nhead: lm_head\nblock:\n  qk: {concat: [attn.q, attn.k]}\n  v: attn.v\n"
        "  o: attn.o\n  g: mlp.gate\n  u: mlp.up\n  d: mlp.down\n  n1: input_norm\n"
        "  n2: post_attention_norm\n"
    )

    def mine(w):
        out = {"trunk.embed_tokens.weight": w["embed"], "trunk.norm.weight": w["norm"]}
        out["lm_head.weight"] = w["head"]
        words = {"v": "v", "o": "o", "g": "gate", "u": "up", "d": "down"}
        words |= {"n1": "norm1", "n2": "norm2"}
        for i in range(families.LAYERS):
            out[f"trunk.layers.{i}.qk.weight"] = torch.cat([w[f"{i}.q"], w[f"{i}.k"]])
            out |= {f"trunk.layers.{i}.{n}.weight": w[f"{i}.{k}"] for n, k in words.items()}
        return out

    target = families.write(tmp_path / "t", mine(A))
    donor = families.write(tmp_path / "d", families.llama(B))
    _, got = merged(target, donor, tmp_path / "out", layouts=[str(file)])
    for name, tensor in mine(A).items():
        expected = (1 - ALPHA) * tensor + ALPHA * mine(B)[name]
        torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-6)


def test_phi3_inside_a_multimodal_model(tmp_path):
    nested = {f"language_model.{name}": tensor for name, tensor in families.phi3(A).items()}
    target = families.write(tmp_path / "t", nested)
    donor = families.write(tmp_path / "d", families.llama(B))
    alignment = omnimerge.align(target, donor)
    assert alignment.target_slots.layout.name == "phi3_nested"
    assert alignment.reasons() == [] and len(alignment.merged) == len(nested)


# --- layout files -------------------------------------------------------------------------------


def test_a_layout_file_that_fits_nothing_is_an_error(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("prefix: trunc.\nhead: lm_head\nblock: {a: attn.q}\n")
    target = families.write(tmp_path / "t", families.llama(A))
    with pytest.raises(LayoutError, match=r"mine fits no checkpoint \(there is no tensor trunc"):
        omnimerge.align(target, target, layouts=[file])
    odd = {
        name.replace("model.layers.", "trunk.stage."): t for name, t in families.llama(B).items()
    }
    donor = families.write(tmp_path / "d", odd)
    with pytest.raises(
        LayoutError, match=r"neither a known one nor mine: there is no tensor trunc"
    ):
        omnimerge.align(target, donor, layouts=[file])


def test_a_layout_of_ones_own_wins_where_all_its_names_are_there(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("prefix: model.\nhead: lm_head\nblock: {self_attn.q_proj: attn.q}\n")
    folder = families.write(tmp_path / "t", families.llama(A))
    assert omnimerge.inspect(folder, layouts=[file])["layout"] == "mine"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("components: {eye.: eyes.}", "'eyes.' does not begin with one of vision., audio."),
        ("components: {eye.: vision}", "'vision' does not begin with one of"),
        ("components: {eye.: llm.}", "'llm.' does not begin with one of"),
        ("about: 2024-13-45", "cannot read layout"),
        ("head: other", "the key 'head' is given twice"),
    ],
)
def test_more_mistakes_in_a_layout_file(line, message, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"prefix: model.\nhead: lm_head\nblock: {{a: attn.q}}\n{line}\n")
    with pytest.raises(LayoutError, match=message):
        read_layouts(file)


def test_a_file_of_a_layout_without_a_prefix_reads_back(tmp_path):
    bare = {name.removeprefix("model."): t for name, t in families.llama(A).items()}
    folder = families.write(tmp_path / "t", bare)
    file = tmp_path / "bare.yaml"
    file.write_text(
        'prefix: ""\nhead: lm_head\nblock: {self_attn.q_proj: attn.q}\n'
        'components: {"a: b.": vision.}\n'
    )
    (layout,) = read_layouts(file)
    with Checkpoint.open(folder) as checkpoint:
        assert slots_of(checkpoint, [layout]).layer_count == families.LAYERS
    again = tmp_path / "again.yaml"
    again.write_text(layout_text(layout))
    assert read_layouts(again) == (layout,)


def test_the_order_of_unknown_checkpoints_does_not_matter(tmp_path):
    def renamed(w, words):
        out = {}
        for name, tensor in families.llama(w).items():
            for before, after in words.items():
                name = name.replace(before, after)
            out[name] = tensor
        return out

    stack = {"model.layers.": "trunk.stage."}
    vague = stack | {"q_proj": "aa", "k_proj": "bb", "v_proj": "cc", "o_proj": "dd"}
    sure = families.write(tmp_path / "sure", renamed(A, stack))
    unsure = families.write(tmp_path / "vague", renamed(B, vague))
    for pair in ((sure, unsure), (unsure, sure)):
        alignment = omnimerge.align(*pair)
        assert alignment.reasons() == []
        assert sum("was inferred" in note for note in alignment.notes) == 2


# --- other people's code and files --------------------------------------------------------------


def test_a_checkpoints_own_code_is_never_run(tmp_path, monkeypatch):
    from click.testing import CliRunner

    tensors = {f"odd.{i}.weight": torch.ones(2, 2) for i in range(3)}
    folder = families.write(
        tmp_path / "rc",
        tensors,
        model_type="foo",
        architectures=["FooForCausalLM"],
        auto_map={"AutoConfig": "configuration_foo.FooConfig"},
    )
    marker = tmp_path / "ran"
    (folder / "configuration_foo.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"open({str(marker)!r}, 'w').write('x')\n"
        "class FooConfig(PretrainedConfig):\n    model_type = 'foo'\n"
    )
    result = CliRunner().invoke(main, ["inspect", str(folder), "--json"], input="y\n")
    assert result.exit_code == 0 and json.loads(result.stdout)["layout"] is None
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "abc"}, {"num_hidden_layers": "3"}, {"rope_scaling": "x"}],
    ids=lambda change: next(iter(change)),
)
def test_odd_configs_of_unknown_layouts_end_in_one_line(change, tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **change}
    folder = families.write(tmp_path / "t", {"x.weight": torch.ones(2, 2)}, **config)
    with pytest.raises(LayoutError):
        omnimerge.align(folder, folder)


def test_token_ids_that_are_no_numbers_are_refused(tmp_path):
    target = families.write(tmp_path / "t", families.llama(A), tokens={"a": 0})
    (target / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1e999}}}')
    with pytest.raises(CheckpointError, match="is not a tokenizer file"):
        omnimerge.align(target, target, vocabulary="overlap")


def test_pickles_without_an_index_are_told_as_such(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for i in (1, 2):
        torch.save({"a": torch.ones(1)}, folder / f"pytorch_model-{i}-of-2.bin")
    with pytest.raises(CheckpointError, match=r"2 pytorch_model\*.bin files and no .*index.json"):
        Checkpoint.open(folder)


def test_layout_files_are_not_overwritten(tmp_path):
    from click.testing import CliRunner

    folder = families.write(tmp_path / "t", families.llama(A))
    file = tmp_path / "plain.yaml"
    file.write_text("mine")
    result = CliRunner().invoke(main, ["layout", str(folder), "-o", str(file)])
    assert result.exit_code == 1 and "exists, perhaps with your corrections" in result.stderr
    result = CliRunner().invoke(main, ["layout", str(folder), "--like", str(tmp_path / "nope")])
    assert result.exit_code == 1


def test_a_hidden_size_that_differs_is_a_few_lines(tmp_path):
    target = families.write(tmp_path / "t", families.llama(A))
    (file,) = target.glob("*.safetensors")
    wide = {n: torch.cat([t, t], dim=-1) for n, t in load_file(file).items()}
    donor = families.write(tmp_path / "d", families.llama(B))
    (other,) = donor.glob("*.safetensors")
    save_file(wide, other, metadata={"format": "pt"})
    reasons = omnimerge.align(target, donor).reasons()
    assert len(reasons) <= 6
    assert any("30 tensors have other shapes, such as" in reason for reason in reasons)
