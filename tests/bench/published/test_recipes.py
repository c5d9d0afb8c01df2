"""Recipes for the published checkpoints, planned against their real headers, without data."""

import re
from pathlib import Path

import published_headers
import pytest
import yaml

import omnimerge
from omnimerge.bench.published import tables

EXAMPLES = Path(__file__).parents[3] / "examples"
RECIPES = sorted([*(EXAMPLES / "optmerge").glob("*.yaml"), *(EXAMPLES / "adamms").glob("*.yaml")])

# 7 matrices a layer; where the target holds tensors twice, more. Embedding, head, final norm: 3.
MERGED = {
    "optmerge/qwen2-vl-7b": 28 * 7,
    "optmerge/qwen2-vl-7b-swudi": 28 * 7,
    "optmerge/internvl2.5-1b": 24 * 7 + 3,  # and what the script takes of the projector
    "optmerge/internvl2.5-1b-swudi": 24 * 7,
    "adamms/llava-onevision-into-qwen2-vl": 28 * 12 + 1,  # biases, norms; no embedding, no head
    "adamms/qwen2-vl-into-llava-onevision": 28 * 12 + 1,
    "adamms/llava-1.5-into-cogvlm": 32 * 12 + 3,  # qkv, o, gate, up, down twice, 2 norms
    "adamms/sharegpt4v-into-cogvlm": 32 * 12 + 3,
    "adamms/mplug-owl2-into-cogvlm": 32 * 12 + 3,
    "adamms/llava-1.5-into-mplug-owl2": 32 * 13 + 3,  # k, v and both norms twice
    "adamms/cogvlm-into-mplug-owl2": 32 * 13 + 3,
    "adamms/mplug-owl2-into-llava-1.5": 32 * 9 + 3,
    "adamms/yi-vl-into-cambrian-34b": 60 * 9 + 3,
}


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return lambda hub: str(published_headers.write(hub, root))


def local(file, headers):
    """The recipe with folders of headers for Hub ids."""
    raw = yaml.safe_load(file.read_text())
    for role in {"base", "target"} & set(raw):
        raw[role] = headers(raw[role])
    raw["models"] = [{**entry, "model": headers(entry["model"])} for entry in raw["models"]]
    return raw


def name(file):
    return f"{file.parent.name}/{file.stem}"


def test_every_recipe_is_here():
    assert {name(file) for file in RECIPES} == set(MERGED)


@pytest.mark.parametrize("file", RECIPES, ids=[name(file) for file in RECIPES])
def test_the_recipe_plans(file, headers):
    raw = local(file, headers)
    plan = omnimerge.plan(raw)
    assert len(plan.merged) == MERGED[name(file)]
    assert not any(job.slot.startswith("vision.") for job in plan.merged)
    kept = {job.output.name for job in plan.jobs if not job.merged}
    if file.parent.name == "optmerge":
        assert {n for n in kept if "embed_tokens" in n or "lm_head" in n or "norm" in n} >= {
            job.output.name for job in plan.jobs if "lm_head" in job.output.name
        }
        assert all(job.output.dtype == "F16" for job in plan.jobs)
    donor = yaml.safe_load(file.read_text())["models"][0]["model"]
    known = {model.hub for model in tables.catalogue().models}
    assert donor in known


def test_sizes_are_those_of_the_hub(headers):
    """Four files of 4.97, 4.99, 4.93 and 1.69 GB for Qwen2-VL-7B; 1.88 GB for InternVL2.5-1B."""
    size = {
        hub: omnimerge.inspect(headers(hub))["bytes"]
        for hub in ("yongxianwei/Qwen2-VL-7B-OCR", "yongxianwei/InternVL2_5-1B_OCR")
    }
    assert size["yongxianwei/Qwen2-VL-7B-OCR"] == pytest.approx(16.58e9, abs=0.005e9)
    assert size["yongxianwei/InternVL2_5-1B_OCR"] == pytest.approx(1.88e9, abs=0.005e9)


def test_the_projector_of_internvl_as_in_the_script(headers):
    plan = omnimerge.plan(local(EXAMPLES / "optmerge" / "internvl2.5-1b.yaml", headers))
    outside = {j.output.name for j in plan.merged if ".layers." not in j.output.name}
    assert outside == {"mlp1.0.weight", "mlp1.1.weight", "mlp1.3.weight"}
    layers = {j.output.name.partition("layers.")[2].partition(".")[2] for j in plan.merged}
    assert len(layers - {""}) == 7


def test_published_settings(headers):
    qwen = omnimerge.plan(local(EXAMPLES / "optmerge" / "qwen2-vl-7b.yaml", headers)).recipe
    assert qwen.all_parameters["variant"] == "lora"
    assert (qwen.all_parameters["iterations"], qwen.all_parameters["scale"]) == (300, 1.0)
    assert qwen.all_parameters["learning_rate"] == 1e-4
    table = tables.table("swudi-settings")
    for file, row in (
        ("qwen2-vl-7b-swudi", "Qwen2-VL-7B"),
        ("internvl2.5-1b-swudi", "InternVL2.5-1B"),
    ):
        given = yaml.safe_load((EXAMPLES / "optmerge" / f"{file}.yaml").read_text())["parameters"]
        assert [given["time"], given["rank_ratio"], given["scale"]] == list(
            table.rows[[r.name for r in table.rows].index(row)].values
        )
    alpha, back = (
        yaml.safe_load((EXAMPLES / "adamms" / f"{file}.yaml").read_text())["parameters"]["alpha"]
        for file in ("llava-onevision-into-qwen2-vl", "qwen2-vl-into-llava-onevision")
    )
    sums = {
        r.name: r.values[8] for r in tables.table("adamms-14").rows if r.name.startswith("alpha")
    }
    assert f"alpha {alpha:.1f}" == max(sums, key=sums.__getitem__)
    both = tables.table("adamms-5")
    into = "into LLaVA-OneVision"
    assert both.value(f"alpha {back:.1f}", into) == both.value("AdaMMS", into)


def test_the_files_are_sparse(headers):
    folder = Path(headers("nyu-visionx/cambrian-34b"))
    assert omnimerge.inspect(folder)["bytes"] > 68e9
    assert sum(file.stat().st_blocks for file in folder.iterdir()) * 512 < 10e6


def test_the_page_names_every_recipe_and_only_tables_that_exist():
    page = (EXAMPLES.parent / "docs" / "published.md").read_text()
    for file in RECIPES:
        assert file.name in page or file.name.endswith("-swudi.yaml"), file.name
    for count in set(MERGED.values()):
        assert f"{count} " in page, count
    shown = set(re.findall(r"omnimerge bench published ([a-z][\w-]+)", page))
    assert {"optmerge-3", "adamms-1", "models", "evaluations"} <= shown <= set(tables.names())


def test_the_page_tells_how_to_evaluate_every_column():
    page = (EXAMPLES.parent / "docs" / "published.md").read_text()
    evaluating = page[page.index("## Evaluating") :]
    for entry in tables.catalogue().evaluations:
        for name in entry.names[1:]:
            if name != "chartqa":  # OptMerge's is VLMEvalKit's
                assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", evaluating), name
    for target in ("CogVlm", "mPLUG_Owl2", "Cambrian", "LLaVA", "LLaVA_OneVision", "InternVLChat"):
        assert f"partial({target}, " in evaluating, target
    assert 'ends in "Answer the question using a single word or phrase."' in evaluating


def test_recipes_name_tables_that_exist():
    named = set()
    for file in RECIPES:
        named |= set(re.findall(r"bench published ([\w.-]*\w)", file.read_text()))
    assert len(named) == 11 and named <= set(tables.names())
