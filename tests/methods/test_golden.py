"""Methods against what published implementations give (tests/golden, its cases.json says which)."""

import json

import pytest
from safetensors.torch import load_file

from omnimerge.methods import all_methods, merge_state_dicts

NAMES = ("square.weight", "tall.weight", "wide.weight")
TOLERANCE = {"wudi": 1e-4}
OPEN = ()
CASES = tuple(f"case{n:02}" for n in range(41) if f"case{n:02}" not in OPEN)


@pytest.mark.parametrize("case", CASES)
def test_case(case, golden):
    spec = next(c for c in json.loads((golden / "cases.json").read_text()) if c["case"] == case)
    assert spec["method"] in all_methods()
    tensors = load_file(golden / "golden.safetensors")
    models = [{name: tensors[f"expert{i}/{name}"] for name in NAMES} for i in range(spec["models"])]
    base = {name: tensors[f"base/{name}"] for name in NAMES} if spec["base"] else None
    merged = merge_state_dicts(spec["method"], models, base, **spec["parameters"])
    for name in NAMES:
        expected = tensors[f"{case}/{name}"]
        error = (merged[name].double() - expected.double()).norm() / expected.double().norm()
        assert error <= TOLERANCE.get(spec["method"], 1e-5), name


def test_every_case_of_a_method_that_exists_is_listed(golden):
    cases = json.loads((golden / "cases.json").read_text())
    assert {c["case"] for c in cases if c["method"] in all_methods()} == {*CASES, *OPEN}
