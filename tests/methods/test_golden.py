"""Methods against what published implementations give (tests/golden, its cases.json says which)."""

import json

import pytest
from safetensors.torch import load_file

from omnimerge.methods import all_methods, merge_tensors

NAMES = ("square.weight", "tall.weight", "wide.weight")
TOLERANCE = {"wudi": 1e-4}
CASES = tuple(
    f"case{n:02}"
    for n in (0, 1, 4, 5, 6, 7, 8, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 38, 39)
)


@pytest.mark.parametrize("case", CASES)
def test_case(case, golden):
    spec = next(c for c in json.loads((golden / "cases.json").read_text()) if c["case"] == case)
    assert spec["method"] in all_methods()
    tensors = load_file(golden / "golden.safetensors")
    for name in NAMES:
        models = [tensors[f"expert{i}/{name}"] for i in range(spec["models"])]
        base = tensors[f"base/{name}"] if spec["base"] else None
        merged = merge_tensors(spec["method"], models, base, **spec["parameters"])
        expected = tensors[f"{case}/{name}"]
        error = (merged.double() - expected.double()).norm() / expected.double().norm()
        assert error <= TOLERANCE.get(spec["method"], 1e-5), name


def test_every_case_of_a_method_that_exists_is_listed(golden):
    cases = json.loads((golden / "cases.json").read_text())
    assert {c["case"] for c in cases if c["method"] in all_methods()} == set(CASES)
