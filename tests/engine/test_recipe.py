"""A wrong recipe is refused before any checkpoint is opened, with every mistake named at once."""

from pathlib import Path

import numpy as np
import pytest

from omnimerge import load_recipe
from omnimerge.errors import RecipeError

GOOD = {
    "method": "adamms",
    "target": "target/",
    "models": [{"model": "donor/"}],
    "parameters": {"alpha": 0.3},
}
TASK = {"method": "task_arithmetic", "base": "b/", "models": ["x/", "y/"]}


def test_defaults():
    recipe = load_recipe(GOOD)
    assert recipe.selection == "language_model"
    assert recipe.vocabulary == "auto"
    assert recipe.max_shard_size == 5 * 10**9
    assert load_recipe(TASK).selection == "all"
    assert load_recipe(TASK).target_reference == "b/"
    assert load_recipe({"method": "linear", "models": ["x/"]}).target_reference == "x/"


def test_weights_of_models_become_the_parameter():
    models = [{"model": "x/", "weight": 0.5}, {"model": "y/"}]
    recipe = load_recipe({"method": "linear", "models": models})
    assert recipe.all_parameters == {"weights": [0.5, 1.0]}


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 1572864), (7, 7)])
def test_sizes(text, size):
    assert load_recipe({**GOOD, "max_shard_size": text}).max_shard_size == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paramters": {}}, "paramters: unknown key, did you mean 'parameters'?"),
        ({"models": [{"modle": "x"}]}, "models.0.modle: unknown key, did you mean 'model'?"),
        ({"method": "adams"}, "unknown merge method 'adams', did you mean 'adamms'?"),
        ({"method": None}, "method:"),
        ({"models": []}, "models:"),
        (
            {"method": "slerp", "models": ["x", "y", "z"], "parameters": {"t": 0.5}},
            "models: slerp takes exactly 1, not 3",
        ),
        (
            {"models": ["x", "y"], "parameters": {"alpha": 0.1, "weights": [1]}},
            "parameters.weights: 1 values for 2 models",
        ),
        ({"branches": {"shared": "image"}}, "branches.shared:"),
        ({"branches": {"txt": "keep"}}, "branches.txt: unknown key"),
        ({"vocabulary": "overlapp"}, "vocabulary:"),
        ({"overrides": [{"match": {"slot": "("}}]}, "'(' is no regular expression"),
        ({"target": None}, "target: adamms needs the checkpoint to merge into"),
        ({"parameters": {}}, "parameters.alpha: required by adamms"),
        ({"parameters": {"alpha": 30}}, "parameters.alpha: 30 is not in [0, 1]"),
        ({"parameters": {"alpha": "much"}}, "parameters.alpha: 'much' is not a number"),
        ({"parameters": {"alpha": float("nan")}}, "parameters.alpha: nan is not finite"),
        ({"parameters": {"alpah": 0.3}}, "no such parameter, did you mean 'alpha'?"),
        ({"select": "llm"}, "select:"),
        ({"dtype": "int4"}, "dtype:"),
        ({"vocabulary": "union"}, "vocabulary:"),
        ({"max_shard_size": "five"}, "max_shard_size: 'five' is no size"),
        ({"seed": "x"}, "seed:"),
        ({"target": ""}, "target: give a path or a Hub id"),
        ({"max_shard_size": "9" * 30 + "GB"}, "is no size to work with; write for"),
        ({"max_shard_size": "0"}, "is no size to work with; write for example 5GB"),
        ({"parameters": {"alpha": "1e-1"}}, "'1e-1' is not a number; write 0.1"),
        ({"overrides": [{"match": {"layers": "3-1"}, "keep": "target"}]}, "'3-1' is no layer"),
        ({"overrides": [{"match": {}}]}, "overrides.0: give either keep: target or parameters"),
        (
            {"overrides": [{"match": {}, "keep": "target", "parameters": {"alpha": 0.1}}]},
            "overrides.0: give either keep: target or parameters",
        ),
        ({"overrides": [{"match": {"layer": "3"}}]}, "overrides.0.match.layer: unknown key"),
        ({"overrides": [{"match": {"layers": "3:5"}}]}, "'3:5' is no layer range"),
        ({"overrides": [{"match": {"name": "("}}]}, "'(' is no regular expression"),
        (
            {"overrides": [{"match": {"component": "vison"}, "keep": "target"}]},
            "overrides.0.match.component",
        ),
        (
            {"overrides": [{"match": {}, "parameters": {"alpha": 2}}]},
            "overrides.0.parameters.alpha: 2 is not in [0, 1]",
        ),
    ],
    ids=str,
)
def test_mistakes_are_named(change, message):
    with pytest.raises(RecipeError) as error:
        load_recipe({**GOOD, **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_given_twice_are_refused():
    models = [{"model": "x", "weight": 0.9}, {"model": "y", "weight": 0.1}]
    with pytest.raises(RecipeError, match=r"parameters.weights: given beside weight entries"):
        load_recipe({"method": "linear", "models": models, "parameters": {"weights": [1, 2]}})


def test_paths_may_be_path_objects():
    recipe = load_recipe({**GOOD, "target": Path("target"), "models": [Path("donor")]})
    assert (recipe.target, recipe.models[0].model) == ("target", "donor")


def test_numpy_numbers_are_numbers():
    recipe = load_recipe({**GOOD, "parameters": {"alpha": np.float32(0.5)}})
    assert recipe.all_parameters["alpha"] == 0.5


def test_keys_can_be_replaced_before_the_recipe_is_checked():
    raw = {"method": "adamms", "models": ["donor"]}
    recipe = load_recipe(raw, replace={"target": "t"}, parameters={"alpha": 0.1})
    assert (recipe.target, recipe.all_parameters) == ("t", {"alpha": 0.1})
    again = load_recipe(recipe, parameters={"alpha": 0.2})
    assert (again.target, again.all_parameters) == ("t", {"alpha": 0.2})


def test_a_missing_base_is_named():
    with pytest.raises(RecipeError, match="base: task_arithmetic works on task vectors"):
        load_recipe({**TASK, "base": None, "target": "t/"})


def test_all_mistakes_are_reported_at_once():
    wrong = {**GOOD, "paramters": {}, "dtyp": "x", "parameters": {"alpha": 5}}
    with pytest.raises(RecipeError) as error:
        load_recipe(wrong)
    problems = "; ".join(error.value.problems)
    assert len(error.value.problems) == 3
    assert all(word in problems for word in ("paramters", "dtyp", "alpha: 5 is not in"))


def test_paths_in_a_file_are_found_beside_it(tmp_path):
    (tmp_path / "models" / "a").mkdir(parents=True)
    file = tmp_path / "recipe.yaml"
    file.write_text("method: average\nmodels: [models/a, elsewhere/b]\n")
    recipe = load_recipe(file)
    assert [m.model for m in recipe.models] == [str(tmp_path / "models/a"), "elsewhere/b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [", "is not valid"),
        ("", "it holds no keys"),
        ("- a\n- b\n", "it holds no keys"),
        ("method: average\nmethod: linear\nmodels: [x]\n", "'method' is given twice"),
        ("method: !!python/object:os.system x\n", "is not valid"),
        ("seed: 2024-13-01\n", "month must be in"),
        ("seed: !!int foo\n", "is not valid"),
        ("a: " + "[" * 3000, "is not valid"),
    ],
)
def test_bad_files_are_explained(text, message, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)


def test_a_missing_file_is_explained(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_searched_parameters_need_no_value():
    recipe = load_recipe({**GOOD, "parameters": {}}, defaults={"alpha": 0.1, "density": 1})
    assert recipe.all_parameters == {"alpha": 0.1}
    assert load_recipe(GOOD, defaults={"alpha": 0.1}).all_parameters == {"alpha": 0.3}
