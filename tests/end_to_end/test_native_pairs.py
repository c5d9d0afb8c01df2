"""Every native pair: merge two architectures over one LLM, reload with transformers, compare."""

from __future__ import annotations

import itertools

import pytest
import tiny_models
import torch

import omnimerge
from omnimerge.checkpoint import Checkpoint

PAIRS = [
    pair
    for family in (tiny_models.QWEN2_FAMILY, tiny_models.LLAMA_FAMILY)
    for pair in itertools.permutations(family, 2)
]
IDS = [f"{donor}-into-{target}" for target, donor in PAIRS]
ALPHA = 0.3


def test_the_list_of_pairs_is_complete():
    assert len(PAIRS) == 7 * 6 + 4 * 3


def assert_decoder_is_interpolated(target, donor, merged, alpha=ALPHA):
    ours, theirs = (tiny_models.decoder_parameters(m) for m in (target, donor))
    got = tiny_models.decoder_parameters(merged)
    assert set(got) == set(ours) == set(theirs)
    for name, value in got.items():
        expected = (1 - alpha) * ours[name].double() + alpha * theirs[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(("target", "donor"), PAIRS, ids=IDS)
def test_pair_merges_and_reloads(target, donor, checkpoints, tmp_path):
    folder = checkpoints(target)
    recipe = {
        "method": "adamms",
        "target": str(folder),
        "models": [str(checkpoints(donor))],
        "parameters": {"alpha": ALPHA},
    }

    plan = omnimerge.merge(recipe, tmp_path / "out")

    merged = tiny_models.load(target, tmp_path / "out")
    target_model, donor_model = tiny_models.build(target), tiny_models.build(donor)
    assert_decoder_is_interpolated(target_model, donor_model, merged)
    decoder = {id(p) for p in tiny_models.decoder_parameters(merged).values()}
    kept = [n for n, p in merged.named_parameters() if id(p) not in decoder]
    before = dict(target_model.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in merged.named_parameters() if n in kept)
    assert len(plan.merged) == len(decoder)
    names = set(Checkpoint.open(folder).tensors)
    assert set(Checkpoint.open(tmp_path / "out").tensors) == names  # the target's published names


@pytest.mark.parametrize(("target", "donor"), PAIRS, ids=IDS)
def test_alpha_zero_is_the_target_bit_for_bit(target, donor, checkpoints, tmp_path):
    folder = checkpoints(target)
    recipe = {
        "method": "adamms",
        "target": str(folder),
        "models": [str(checkpoints(donor))],
        "parameters": {"alpha": 0.0},
    }
    omnimerge.merge(recipe, tmp_path / "out")
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "out")
    for name in before.tensors:
        assert torch.equal(
            before.read(name).view(torch.uint8), after.read(name).view(torch.uint8)
        ), name


@pytest.mark.parametrize("naming", ["v5", "original"])
@pytest.mark.parametrize("role", ["donor", "target"])
def test_other_namings_of_one_model_give_the_same_merge(naming, role, checkpoints, tmp_path):
    other = checkpoints("llava_onevision", naming=naming)
    qwen = checkpoints("qwen2_vl")
    target, donor = (qwen, other) if role == "donor" else (other, qwen)
    recipe = {
        "method": "adamms",
        "target": str(target),
        "models": [str(donor)],
        "parameters": {"alpha": ALPHA},
    }
    omnimerge.merge(recipe, tmp_path / "out")

    ours, theirs = tiny_models.build("qwen2_vl"), tiny_models.build("llava_onevision")
    if role == "donor":
        merged = tiny_models.load("qwen2_vl", tmp_path / "out")
        assert_decoder_is_interpolated(ours, theirs, merged)
    elif naming == "v5":
        merged = tiny_models.load("llava_onevision", tmp_path / "out")
        assert_decoder_is_interpolated(theirs, ours, merged)
    else:
        out = Checkpoint.open(tmp_path / "out")
        name = "model.layers.1.mlp.up_proj.weight"
        a, b = (tiny_models.decoder_parameters(m) for m in (theirs, ours))
        expected = (1 - ALPHA) * a["layers.1.mlp.up_proj.weight"] + ALPHA * b[
            "layers.1.mlp.up_proj.weight"
        ]
        torch.testing.assert_close(out.read_tensor(name), expected.detach())
        assert "model.mm_projector.0.weight" in out.tensors


def test_same_architecture_in_two_namings_merges_every_component(checkpoints, tmp_path):
    published = checkpoints("llava_onevision")
    v5 = checkpoints("llava_onevision", naming="v5", own="second")
    recipe = {"method": "linear", "models": [str(published), str(v5)]}
    plan = omnimerge.merge(recipe, tmp_path / "out")
    assert plan.kept_reasons() == {}
    assert len(plan.merged) == len(Checkpoint.open(published).tensors)
    tiny_models.load("llava_onevision", tmp_path / "out")


def test_task_arithmetic_with_an_llm_as_base(checkpoints, tmp_path):
    base = checkpoints("qwen2", own="base")
    experts = [checkpoints("qwen2_vl", own=f"expert{i}") for i in range(2)]
    recipe = {
        "method": "task_arithmetic",
        "target": str(experts[0]),
        "base": str(base),
        "models": [{"model": str(experts[0]), "weight": 0.5}, {"model": str(experts[1])}],
        "parameters": {"scale": 0.7},
        "select": "language_model",
    }
    omnimerge.merge(recipe, tmp_path / "out")
    merged = tiny_models.decoder_parameters(tiny_models.load("qwen2_vl", tmp_path / "out"))
    b = tiny_models.decoder_parameters(tiny_models.build("qwen2", own="base"))
    e = [
        tiny_models.decoder_parameters(tiny_models.build("qwen2_vl", own=f"expert{i}"))
        for i in range(2)
    ]
    for name, value in merged.items():
        expected = b[name] + 0.7 * (0.5 * (e[0][name] - b[name]) + (e[1][name] - b[name]))
        torch.testing.assert_close(value, expected, msg=name)
