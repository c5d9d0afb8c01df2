"""docs/add-a-family.md, followed literally: its commands are run, its file is used."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import llm_layouts as families
import pytest
import torch
from click.testing import CliRunner

from omnimerge.arch import layout as layout_module
from omnimerge.arch import layouts, read_layouts
from omnimerge.checkpoint import Checkpoint
from omnimerge.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "add-a-family.md"


def newfamily(w):
    """The example of the page."""
    plain = families.internlm2(w)
    out = {"trunk.table.weight": w["embed"], "trunk.last_norm.weight": w["norm"]}
    out["answer.weight"] = w["head"]
    for i in range(families.LAYERS):
        at = f"trunk.stage.{i}."
        out[f"{at}mix.weight"] = plain[f"language_model.model.layers.{i}.attention.wqkv.weight"]
        out[f"{at}out.weight"], out[f"{at}narrow.weight"] = w[f"{i}.o"], w[f"{i}.down"]
        out[f"{at}wide.weight"] = torch.cat([w[f"{i}.up"], w[f"{i}.gate"]])
        out[f"{at}norm1.weight"], out[f"{at}norm2.weight"] = w[f"{i}.norm1"], w[f"{i}.norm2"]
    out["eye.patch.weight"], out["bridge.0.weight"] = torch.ones(3, 3), torch.ones(2, 2)
    return out


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory as the page supposes it, with a copy of the built-in layouts."""
    a, b = families.decoder("a"), families.decoder("b")
    families.write(tmp_path / "newfamily", newfamily(a))
    families.write(tmp_path / "sibling", families.llama(b))
    builtin = tmp_path / "src" / "omnimerge" / "arch" / "layouts"
    shutil.copytree(layout_module.LAYOUTS, builtin)
    monkeypatch.setattr(layout_module, "LAYOUTS", builtin)
    monkeypatch.chdir(tmp_path)
    layouts.cache_clear()
    yield tmp_path
    layouts.cache_clear()


def run(line):
    """One line of the page's shell blocks."""
    program, *words = shlex.split(line)
    if program == "cp":
        shutil.copy(*words)
        layouts.cache_clear()
        return ""
    assert program == "omnimerge"
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, f"{line}: {result.output}"
    return result.output


def test_the_page(place):
    text = PAGE.read_text(encoding="utf-8")
    steps = re.split(r"\n\*\*(?=\d\.)", text)[1:]
    assert len(steps) == 5
    blocks = [re.findall(r"```(\w+)\n(.*?)```", step, flags=re.S) for step in steps]
    outputs = []
    for found in blocks:
        for kind, content in found:
            if kind == "bash":
                outputs.append([run(line) for line in content.strip().splitlines()])
            else:
                corrected = content
                inferred = read_layouts(place / "newfamily.yaml")[0]
                (place / "newfamily.yaml").write_text(corrected)

    look, infer, attempts, contribute = outputs
    assert "layout  unknown" in look[0] and "other" in look[0]
    assert "layout -> newfamily.yaml" in infer[0]
    # What the inference left to correct: the two norms of a layer, which are alike in all models.
    (mine,) = read_layouts(place / "newfamily.yaml")
    assert (inferred.layers, inferred.embed, inferred.head) == (mine.layers, mine.embed, mine.head)
    assert {
        k: v for k, v in mine.block.items() if "norm" not in k
    }.items() <= inferred.block.items()
    assert [("mergeable: yes" in out) for out in attempts[:2]] == [True, True]
    assert "merged 21 tensors" in attempts[2] and "kept 2 of the target's" in attempts[2]
    assert "layout newfamily" in contribute[1] and "mergeable: yes" in contribute[1]

    a, b = newfamily(families.decoder("a")), newfamily(families.decoder("b"))
    with Checkpoint.open(place / "merged") as got:
        assert set(got.tensors) == set(a)
        for name, tensor in a.items():
            own = name.startswith(("eye.", "bridge."))
            expected = tensor if own else 0.7 * tensor + 0.3 * b[name]
            torch.testing.assert_close(got.read_tensor(name), expected, rtol=1e-6, atol=1e-6)
