"""Every method, by a recipe, on a real architecture; the output loads with nothing missing."""

import pytest
import tiny_models
import torch

import omnimerge
from omnimerge.methods import all_methods, merge_tensors

PARAMETERS = {"adamms": {"alpha": 0.3}, "slerp": {"t": 0.3}, "nearswap": {"t": 0.01}}


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_method(name, checkpoints, tmp_path):
    method = all_methods()[name]
    base = checkpoints("qwen2_vl", own="base")
    experts = [checkpoints("qwen2_vl", own=f"expert{i}") for i in range(2)]
    count = min(2, method.models[1] or 2) - method.takes_target
    models = experts[:count]
    recipe = {
        "method": name,
        "base": str(base),
        "models": [str(model) for model in models],
        "parameters": PARAMETERS.get(name, {}),
    }
    plan = omnimerge.merge(recipe, tmp_path / "out")

    merged = tiny_models.decoder_parameters(tiny_models.load("qwen2_vl", tmp_path / "out"))
    leaf = "layers.1.mlp.up_proj.weight"
    tensors = [
        tiny_models.decoder_parameters(tiny_models.build("qwen2_vl", own=own))[leaf].detach()
        for own in ("base", "expert0", "expert1")
    ]
    inputs = tensors[:2] if method.takes_target else tensors[1 : 1 + count]
    expected = merge_tensors(name, inputs, tensors[0], **PARAMETERS.get(name, {}))
    torch.testing.assert_close(merged[leaf].detach(), expected, rtol=1e-5, atol=1e-6)
    selected = {"all": 46, "language_model": 27, "linear": 14}[method.select]
    assert len(plan.merged) == selected
