"""Multimodal architectures of transformers: inspect, map, merge and reload each, nothing lost.

`python -m pytest tests/end_to_end/test_architectures.py -k list -s` prints the list.
"""

from __future__ import annotations

import re

import pytest
import tiny_multimodal
import torch
import transformers

import omnimerge
from omnimerge.checkpoint import Checkpoint
from omnimerge.errors import LayoutError

TYPES = sorted(tiny_multimodal.BUILDERS)
# What no table of ours knows: transformers itself tells where the language model lies.
BY_TRANSFORMERS = {"lfm2_vl", "blip-2", "fuyu", "emu3"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(target, donor) of a type: the donor is a perturbed copy."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace("-", "_"))
            tiny_multimodal.save(name, folder / "target")
            tiny_multimodal.save_perturbed(name, folder / "donor")
            made[name] = folder / "target", folder / "donor"
        return made[name]

    return get


def test_the_list_is_long_enough():
    known = set(transformers.CONFIG_MAPPING)
    multimodal = [name for name in TYPES if name in known]
    assert len(multimodal) == len(TYPES) >= 46
    print("\n" + "\n".join(multimodal))


@pytest.mark.parametrize("name", TYPES)
def test_type(name, pair, tmp_path):
    target, donor = pair(name)

    summary = omnimerge.inspect(target)
    assert summary["note"] == ""
    assert (summary["layout"] == name) == (name in BY_TRANSFORMERS)

    alignment = omnimerge.align(target, donor, select="all")
    assert alignment.reasons() == []
    # The same architecture twice: whatever is a floating-point parameter has a counterpart, and
    # every tensor of both sides is accounted for (align proves it).
    unmatched = {
        why for why in alignment.kept.values() if why not in ("a buffer, not a parameter",)
    }
    assert {why for why in unmatched if not why.endswith("share no ancestor")} <= {
        "I64 is not merged"
    }, unmatched
    language = omnimerge.align(target, donor)
    assert [m.target for m in language.merged] == [
        name for name, slot in language.target_slots.by_name.items() if slot.startswith("llm.")
    ]
    assert len(language.merged) >= 2 * 7

    recipe = {"method": "adamms", "target": str(target), "models": [str(donor)]}
    omnimerge.merge({**recipe, "parameters": {"alpha": 0.0}}, tmp_path / "zero")
    omnimerge.merge({**recipe, "parameters": {"alpha": 0.4}}, tmp_path / "merged")
    with (
        Checkpoint.open(target) as before,
        Checkpoint.open(donor) as other,
        Checkpoint.open(tmp_path / "zero") as zero,
        Checkpoint.open(tmp_path / "merged") as merged,
    ):
        assert list(merged.tensors) == list(before.tensors)
        reached = {m.target for m in language.merged}
        for tensor in before.tensors:
            ours, theirs = before.read(tensor), other.read(tensor)
            assert torch.equal(zero.read(tensor).view(torch.uint8), ours.view(torch.uint8))
            expected = 0.6 * ours + 0.4 * theirs if tensor in reached else ours
            torch.testing.assert_close(merged.read(tensor), expected, rtol=1e-6, atol=1e-7)
    tiny_multimodal.load(name, tmp_path / "merged")  # nothing missing, unexpected or left random


def test_a_type_that_comes_later_works_or_is_refused(pair, tmp_path):
    """Unknown names are no partial merge: an invented class is refused, with what to do."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    target, _ = pair("qwen2_vl")
    folder = tmp_path / "later"
    shutil.copytree(target, folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.layers.", "trunk.stage."): t for name, t in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "qwen9_vl", "architectures": ["Qwen9VLForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    alignment = omnimerge.align(folder, target)
    assert alignment.reasons() == [] and "was inferred" in alignment.notes[0]
    assert len(alignment.merged) == 27
    # Names that say nothing, and nothing to compare them with: refused, with what is open.
    nonsense = {name.replace("self_attn.", "m."): t for name, t in renamed.items()}
    nonsense = {name.replace("_proj.", "."): t for name, t in nonsense.items()}
    nonsense = {
        re.sub(r"m\.[qo]\.", lambda m: f"x{ord(m[0][2])}.", n): t for n, t in nonsense.items()
    }
    save_file(nonsense, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LayoutError, match=r"inferred for certain: .*; give --layout FILE"):
        omnimerge.align(folder, folder)
    # Known names with matrices that have no counterpart: refused too, never merged in part.
    renamed = {name.replace("self_attn.q_proj", "self_attn.qx"): t for name, t in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    reasons = omnimerge.align(folder, target).reasons()
    assert any("matrices of the target get nothing" in reason for reason in reasons)
    assert any("give it with --layout" in reason for reason in reasons)
