"""Experts given as adapters and as full checkpoints lead to one merged model."""

import pytest
import tiny_adapters
import tiny_models
import torch

import omnimerge
from omnimerge.checkpoint import Checkpoint
from omnimerge.methods import LowRank, all_methods, merge_state_dicts

PARAMETERS = {
    "adamms": {"alpha": 0.3}, "slerp": {"t": 0.3}, "nearswap": {"t": 0.01},
    "wudi": {"iterations": 20}, "swudi": {"time": 50.0},
}  # fmt: skip
BOTH = sorted(name for name, method in all_methods().items() if not method.adapters_only)


@pytest.fixture(scope="module")
def experts(checkpoints, tmp_path_factory):
    """A base, two adapters on it, and the same two experts as full checkpoints."""
    root = tmp_path_factory.mktemp("experts")
    base = checkpoints("qwen2_vl", own="base")
    adapters, full = [], []
    for number in range(2):
        adapters.append(root / f"lora{number}")
        model = tiny_models.load("qwen2_vl", base)
        options = {"r": 3, "rank_pattern": {"q_proj": 2}} if number else {"r": 3}
        if number:  # not all modules
            options["target_modules"] = tiny_adapters.ALL_LINEAR[:-1]
        merged = tiny_adapters.save(model, adapters[-1], seed=number + 1, size=0.2, **options)
        merged = {name.replace(".base_layer", ""): t for name, t in merged.items()}
        model = tiny_models.load("qwen2_vl", base)
        model.load_state_dict(merged)
        full.append(tiny_models.save(model, root / f"full{number}"))
    return base, adapters, full


def recipe(method, base, models, **keys):
    return {
        "method": method, "base": str(base), "models": models,
        "parameters": PARAMETERS.get(method, {}), **keys,
    }  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_adapters_merge_as_full_experts_do(name, experts, tmp_path):
    base, adapters, full = experts
    count = min(2, all_methods()[name].models[1] or 2) - all_methods()[name].takes_target
    entries = [{"adapter": str(folder)} for folder in adapters[:count]]
    omnimerge.merge(recipe(name, base, entries), tmp_path / "a")
    omnimerge.merge(recipe(name, base, [str(f) for f in full[:count]]), tmp_path / "b")
    tiny_models.load("qwen2_vl", tmp_path / "a")
    a, b, origin = (Checkpoint.open(f) for f in (tmp_path / "a", tmp_path / "b", base))
    moved = 0.0
    for tensor in a.tensors:
        found, expected = a.read_tensor(tensor), b.read_tensor(tensor)
        assert (found - expected).norm() <= 1e-4 * expected.norm(), tensor
        moved += float((found - origin.read_tensor(tensor)).norm())
        change = expected - origin.read_tensor(tensor)
        # The change alone agrees too, but for the rounding of full experts, which is relative to
        # the weights.
        assert (found - expected).norm() <= 2e-3 * change.norm() + 1e-6, tensor
    assert moved > 0.1


def test_robustmerge_merges_the_factors(experts, tmp_path):
    base, adapters, full = experts
    entries = [{"adapter": str(adapters[0])}, {"adapter": str(adapters[0]), "weight": 0.5}]
    plan = omnimerge.merge(recipe("robustmerge", base, entries), tmp_path / "out")
    out, origin = Checkpoint.open(tmp_path / "out"), Checkpoint.open(base)
    sources = [checkpoint for checkpoint, _ in plan.merged[0].sources]
    name = "model.layers.1.mlp.up_proj.weight"
    factors = [LowRank(*checkpoint.factors(name)) for checkpoint in sources]
    expected = merge_state_dicts(
        "robustmerge", [{name: f} for f in factors], {name: origin.read_tensor(name)},
        weights=[1.0, 0.5],
    )  # fmt: skip
    torch.testing.assert_close(out.read_tensor(name), expected[name])
    assert not torch.equal(out.read_tensor(name), origin.read_tensor(name))
    with pytest.raises(omnimerge.OmnimergeError, match="robustmerge merges LoRA adapters"):
        omnimerge.plan(recipe("robustmerge", base, [str(f) for f in full]))
    ranks = [{"adapter": str(folder)} for folder in adapters]
    with pytest.raises(omnimerge.OmnimergeError, match=r"adapters of one rank, not of \[2, 3\]"):
        omnimerge.merge(recipe("robustmerge", base, ranks), tmp_path / "ranks")
