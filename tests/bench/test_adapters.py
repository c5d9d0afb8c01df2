"""Adapters of miniatures: a line without PEFT says so; first matrices are PEFT's bounds."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from omnimerge.bench import lines
from omnimerge.bench.adapters import with_adapter
from omnimerge.bench.line import BenchError


@pytest.mark.parametrize("line", ["qwen2vl", "modality"])
def test_without_peft_nothing_is_begun(line, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)

    with pytest.raises(BenchError, match="pip install peft"):
        lines.get(line).build(tmp_path, preset="quick", seed=0, on_progress=print)

    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]


def test_first_matrices_follow_their_names_alone():
    made = []
    for _ in range(2):
        torch.manual_seed(len(made))
        model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 4))
        made.append(
            with_adapter(
                model,
                rank=2,
                matrices="0",
                draw=lambda key: torch.Generator().manual_seed(len(key)),
            )
        )
    one, other = (
        {k: v for k, v in each.named_parameters() if "lora_" in k} for each in made
    )  # fmt: skip
    assert len(one) == 2 and all(torch.equal(one[key], other[key]) for key in one)
    (first,) = (v for k, v in one.items() if "lora_A" in k)
    assert first.shape == (2, 64) and 0.5 / math.sqrt(64) < first.abs().max() <= 1 / math.sqrt(64)
    (second,) = (v for k, v in one.items() if "lora_B" in k)
    assert not second.any()
