"""Every method, by a recipe, on a real architecture; the output loads with nothing missing."""

import pytest
import tiny_adapters
import tiny_models
import torch

import omnimerge
from omnimerge.checkpoint import Checkpoint
from omnimerge.methods import all_methods, merge_state_dicts

PARAMETERS = {"adamms": {"alpha": 0.3}, "slerp": {"t": 0.3}, "nearswap": {"t": 0.01}}


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_method(name, checkpoints, tmp_path):
    method = all_methods()[name]
    base = checkpoints("qwen2_vl", own="base")
    experts = [checkpoints("qwen2_vl", own=f"expert{i}") for i in range(2)]
    count = min(2, method.models[1] or 2) - method.takes_target
    models = experts[:count]
    entries = [str(model) for model in models]
    if method.adapters_only:  # compared with its formula in test_adapters.py
        for number, _ in enumerate(entries):
            model = tiny_models.load("qwen2_vl", base)
            tiny_adapters.save(model, tmp_path / f"lora{number}", seed=number)
            entries[number] = {"adapter": str(tmp_path / f"lora{number}")}
    recipe = {
        "method": name,
        "base": str(base),
        "models": entries,
        "parameters": PARAMETERS.get(name, {}),
    }
    plan = omnimerge.merge(recipe, tmp_path / "out")

    tiny_models.load("qwen2_vl", tmp_path / "out")
    selected = {"all": 46, "language_model": 27, "linear": 14}[method.select]
    assert len(plan.merged) == selected
    if method.adapters_only:
        return
    names = [job.output.name for job in plan.merged]
    whole = [
        {name: checkpoint.read_tensor(name) for name in names}
        for checkpoint in map(Checkpoint.open, [base, *models])
    ]
    inputs = whole if method.takes_target else whole[1:]
    expected = merge_state_dicts(name, inputs, whole[0], **PARAMETERS.get(name, {}))
    out = Checkpoint.open(tmp_path / "out")
    for each in names:
        torch.testing.assert_close(out.read_tensor(each), expected[each], rtol=1e-5, atol=1e-6)
