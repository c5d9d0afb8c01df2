"""Every recipe in examples/ and every recipe shown in the docs parses and runs."""

import re
from pathlib import Path

import click
import pytest
import tiny_adapters
import tiny_models
import yaml

import omnimerge

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.y*ml"))
IDS = [file.name for file in EXAMPLES]


def _adapter(checkpoints, folder, seed):
    tiny_adapters.save(tiny_models.load("qwen2_vl", checkpoints("qwen2_vl")), folder, seed=seed)
    return folder


def test_there_are_examples():
    assert {"adamms.yaml", "task_arithmetic.yaml"} <= set(IDS)


@pytest.mark.parametrize("file", EXAMPLES, ids=IDS)
def test_example_merges_tiny_models(file, checkpoints, tmp_path):
    raw = yaml.safe_load(file.read_text())
    recipe = omnimerge.load_recipe(raw)
    donor = "llava_onevision" if recipe.merge_method.takes_target else "qwen2_vl"
    models = [
        {"adapter": str(_adapter(checkpoints, tmp_path / f"adapter{i}", i))}
        if "adapter" in entry
        else {**entry, "model": str(checkpoints(donor, own=f"m{i}"))}
        for i, entry in enumerate(raw["models"])
    ]
    for role in ("target", "base"):
        if role in raw:
            raw[role] = str(checkpoints("qwen2_vl"))
    plan = omnimerge.merge({**raw, "models": models}, tmp_path / "out")
    # 27 tensors of the language model; the projector's 6 too where all components are the same.
    expected = {"adamms.yaml": 27, "task_arithmetic.yaml": 33, "adapters.yaml": 14}
    expected["several_donors.yaml"] = 27 - 5  # without two norms a layer and the final one
    assert len(plan.merged) == expected[file.name]
    assert not any(job.slot.startswith("vision.") for job in plan.merged)
    tiny_models.load("qwen2_vl", tmp_path / "out")


def _is_part(block):
    return not {"method", "models"} <= set(block)


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/recipe.md", "docs/adapters.md", "docs/mapping/options.md",
     "docs/mapping/branches.md"],
)  # fmt: skip
def test_recipes_in_the_docs_parse(page):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    assert blocks, page
    for block in blocks:
        raw = yaml.safe_load(block)
        rest = {"method": "adamms", "target": "t", "models": ["d"], "parameters": {"alpha": 0.1}}
        omnimerge.load_recipe({**rest, **raw} if _is_part(raw) else raw)


PAGES = [
    file.relative_to(ROOT).as_posix()
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "omnimerge " in file.read_text()
]


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_docs_exist_with_their_options(page):
    from omnimerge.cli import main

    text = (ROOT / page).read_text()
    lines = [line for block in re.findall(r"```(?:bash|text)\n(.*?)```", text, flags=re.S)
             for line in block.splitlines() if re.match(r"(\$ )?omnimerge \w", line)]  # fmt: skip
    lines += re.findall(r"`(omnimerge \w[^`]*)`", text)
    assert lines, page
    for line in lines:
        words = line.removeprefix("$ ").split("#")[0].split()[1:]
        command = main
        while words and isinstance(command, click.Group):
            command = command.get_command(None, words.pop(0))
        assert command is not None, line
        known = {option for param in command.params for option in param.opts}
        assert {w for w in words if w.startswith("-")} <= known, line
