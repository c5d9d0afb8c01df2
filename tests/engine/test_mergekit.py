"""mergekit configurations: what they say in recipes, and what can not be said."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import omnimerge
from omnimerge.engine import build_plan, load_recipe
from omnimerge.engine.mergekit import convert, look_at
from omnimerge.errors import ConversionError
from omnimerge.methods import merge_state_dicts

NAMES = ("square.weight", "tall.weight", "wide.weight")
GLOBAL = {"scale": "lambda", "select_top": "select_topk", "iterations": "max_iter"}
NEEDS_BASE = ("slerp", "model_stock", "sce", "nearswap", "arcee_fusion")


def config(method, *models, base="base", **parameters):
    """A configuration; a model is a name, or a name and its parameters."""
    entries = [m if isinstance(m, tuple) else (m, {}) for m in models]
    found = {
        "merge_method": method,
        "models": [{"model": name, "parameters": own} for name, own in entries],
        "parameters": {key.rstrip("_"): value for key, value in parameters.items()},
    }
    return {**found, "base_model": base} if base else found


def recipe_of(given, **options):
    return convert(given, **options).recipe


def problems_of(given, **options):
    with pytest.raises(ConversionError) as caught:
        convert(given, **options)
    assert str(caught.value).count("\n") == len(caught.value.problems)
    return caught.value.problems


# --- numbers ----------------------------------------------------------------------------------


def as_mergekit(spec):
    """The configuration that a reference case was computed from."""
    parameters = dict(spec["parameters"])
    weights = parameters.pop("weights", None)
    merge = parameters.pop("merge", None)
    shared = {GLOBAL.get(key, key): value for key, value in parameters.items()}
    if merge == "sum":
        shared["normalize"] = False
    own = [{"weight": w} for w in weights] if weights else [{}] * spec["models"]
    models = [(f"expert{i}", values) for i, values in enumerate(own)]
    return config(spec["method"], *models, base="base" if spec["base"] else None, **shared)


@pytest.mark.parametrize("number", range(25, 41))
def test_a_converted_recipe_gives_mergekits_numbers(number, golden):
    spec = json.loads((golden / "cases.json").read_text())[number]
    assert spec["source"] == "mergekit 0.1.5"
    recipe = load_recipe(recipe_of(as_mergekit(spec)))
    tensors = load_file(golden / "golden.safetensors")

    def state(name):
        return {leaf: tensors[f"{name}/{leaf}"] for leaf in NAMES}

    models = [state(entry.model) for entry in recipe.models]
    base = state(recipe.base) if recipe.base else None
    merged = merge_state_dicts(recipe.method, models, base, **recipe.all_parameters)
    for name in NAMES:
        expected = tensors[f"{spec['case']}/{name}"].double()
        assert (merged[name] - expected).norm() / expected.norm() <= 1e-5, name


@pytest.fixture
def family(checkpoints, tmp_path):
    """Three plain models of four layers and their base, in one folder."""
    for own in ("base", "a", "b"):
        shutil.copytree(checkpoints("llama", own=own, num_hidden_layers=4), tmp_path / own)
    return {own: str(tmp_path / own) for own in ("base", "a", "b")}


def test_gradients_and_filters_reach_the_tensors_that_mergekit_means(family):
    gradient = [{"filter": "self_attn", "value": [0, 1, 0.5]}, {"value": [1, 0.25]}]
    filtered = [
        {"filter": "q_proj", "value": 0.125},
        {"filter": "proj", "value": 0.25},
        {"filter": "lm_head", "value": [0.75, 9]},
        {"value": 0.5},
    ]
    given = config(
        "task_arithmetic",
        (family["a"], {"weight": gradient}),
        (family["b"], {"weight": filtered}),
        base=family["base"],
        lambda_=[0.5, 1],
    )
    plan = build_plan(load_recipe(recipe_of(given)))
    found = {job.output.name: job.parameters for job in plan.jobs}
    assert len(found) == 4 * 9 + 3 and all(job.merged for job in plan.jobs)

    def near(name, weights, scale):
        assert found[name]["weights"] == pytest.approx(weights), name
        assert found[name]["scale"] == pytest.approx(scale), name

    # outside of the layers: the first value of every gradient
    near("model.embed_tokens.weight", [1, 0.5], 0.5)
    near("model.norm.weight", [1, 0.5], 0.5)
    near("lm_head.weight", [1, 0.75], 0.5)
    # layer l of 4 lies at l / 3
    for layer, attention in enumerate([0, 2 / 3, 5 / 6, 0.5]):
        at, other, scale = f"model.layers.{layer}", 1 - 0.25 * layer, 0.5 + layer / 6
        near(f"{at}.self_attn.q_proj.weight", [attention, 0.125], scale)
        near(f"{at}.self_attn.o_proj.weight", [attention, 0.25], scale)
        near(f"{at}.mlp.up_proj.weight", [other, 0.25], scale)
        near(f"{at}.input_layernorm.weight", [other, 0.5], scale)


def test_a_converted_recipe_merges(family, tmp_path):
    given = config(
        "slerp",
        family["base"],
        family["a"],
        base=family["base"],
        t=[{"filter": "mlp", "value": [0, 0, 1, 1]}, {"value": 0}],
    )
    omnimerge.merge(load_recipe(recipe_of(given)), tmp_path / "out")
    ours, base, other = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", tmp_path / "base", tmp_path / "a")
    )
    for name, tensor in ours.items():
        far = "mlp" in name and int(name.split(".")[2]) >= 2
        assert tensor.allclose((other if far else base)[name], atol=1e-6), name


# --- methods ----------------------------------------------------------------------------------

A, B = ("a", {"weight": 1}), ("b", {"weight": 3})
CASES = {
    "linear": (config("linear", A, B, base=None), [1, 3], {"normalize": True}),
    "linear adds the base": (
        config("linear", A, B, weight=[0.5]),
        [1, 3, 0.5],
        {"normalize": True},
    ),
    "task_arithmetic": (config("task_arithmetic", A, B, lambda_=0.3), [1, 3], {"scale": 0.3}),
    "task_arithmetic, normalize": (
        config("task_arithmetic", A, B, normalize=True),
        [0.25, 0.75],
        {"scale": 1.0},
    ),
    "ties": (config("ties", A, B), [1, 3], {"density": 1.0, "scale": 1.0, "merge": "mean"}),
    "ties, sum": (
        config("ties", A, B, normalize=False, density=0.3),
        [1, 3],
        {"density": 0.3, "scale": 1.0, "merge": "sum"},
    ),
    "breadcrumbs": (
        config("breadcrumbs", A, B, density=0.9),
        [1, 3],
        {"density": 0.9, "gamma": 0.01, "scale": 1.0, "normalize": False},
    ),
    "breadcrumbs, all kept": (
        config("breadcrumbs_ties", A, B, gamma=0.2),
        [1, 3],
        {"density": 1.0, "gamma": 0.0, "scale": 1.0, "normalize": False},
    ),
    "dare_linear": (
        config("dare_linear", A, B, density=0.5),
        [1, 3],
        {"density": 0.5, "scale": 1.0},
    ),
    "dare_linear, not rescaled": (
        config("dare_linear", A, B, density=0.5, rescale=False, lambda_=0.5),
        [1, 3],
        {"density": 0.5, "scale": 0.25},
    ),
    "dare_ties": (
        config("dare_ties", A, B, density=0.5),
        [1, 3],
        {"density": 0.5, "scale": 1.0, "merge": "sum"},
    ),
    "dare_ties, mean, not rescaled": (
        config("dare_ties", A, B, density=0.5, normalize=True, rescale=False),
        [1, 3],
        {"density": 0.5, "scale": 0.5, "merge": "mean"},
    ),
    "della": (
        config("della", A, B, density=0.5, epsilon=0),
        [1, 3],
        {"density": 0.5, "scale": 1.0, "merge": "mean", "epsilon": 0.0},
    ),
    "della, sum": (
        config("della", A, B, density=0.5, epsilon=0, normalize=False, lambda_=0.3),
        [1, 3],
        {"density": 0.5, "scale": 0.3, "merge": "sum", "epsilon": 0.0},
    ),
    "della_linear, all kept": (
        config("della_linear", A, B),
        [1, 3],
        {"density": 1.0, "scale": 1.0, "epsilon": 0.0},
    ),
    "nuslerp": (config("nuslerp", A, B, base=None), [1, 3], None),
    "nuslerp, no weight": (
        config("nuslerp", "a", "b", base=None, weight=0),
        [1, 1],
        None,
    ),
    "multislerp": (config("multislerp", A, B, base=None), [1, 3], None),
    "karcher": (
        config("karcher", "a", "b", base=None, tol="1e-7"),
        None,
        {"iterations": 10, "tolerance": 1e-7},
    ),
    "model_stock": (config("model_stock", "a", "b"), None, None),
    "sce": (config("sce", "a", "b", select_topk=0.4), None, {"select_top": 0.4}),
    "slerp": (config("slerp", "base", "a", t=0.3), None, {"t": 0.3}),
    "nearswap": (config("nearswap", "a", t="1e-3"), None, {"t": 0.001}),
    "arcee_fusion": (config("arcee_fusion", "a"), None, None),
    "passthrough": (
        config("passthrough", ("a", {"scale": 0.5}), base=None),
        None,
        {"scale": 0.5},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_method(case):
    given, weights, parameters = CASES[case]
    recipe = recipe_of(given)
    assert [entry.get("weight") for entry in recipe["models"]] == (
        weights or [None] * len(recipe["models"])
    )
    assert recipe.get("parameters") == parameters
    assert "overrides" not in recipe
    parsed = load_recipe(recipe)
    assert ("base" in recipe) is parsed.merge_method.needs_base


def test_every_model_takes_the_nearest_value():
    own = ("b", {"weight": [{"filter": "mlp", "value": 2}]})
    recipe = recipe_of(config("linear", "a", own, base=None, weight=0.5))
    assert [entry["weight"] for entry in recipe["models"]] == [0.5, 0.5]
    assert recipe["overrides"] == [
        {"match": {"name": "mlp"}, "parameters": {"weights": [0.5, 2.0]}}
    ]


def test_slices_of_whole_models_are_models():
    sources = [
        {"model": "base", "layer_range": [0, 8]},
        {"model": "a", "layer_range": [0, 8]},
    ]
    given = {
        "merge_method": "slerp",
        "base_model": "base",
        "slices": [{"sources": sources, "parameters": {"t": [0, 1, 1]}}],
        "parameters": {"t": 0.5},
    }
    recipe = recipe_of(given)
    assert recipe["parameters"] == {"t": 0.0} and recipe["models"] == [{"model": "a"}]
    ranges = {o["match"]["layers"]: o["parameters"]["t"] for o in recipe["overrides"]}
    assert ranges == pytest.approx({"1": 2 / 7, "2": 4 / 7, "3": 6 / 7, "4-7": 1.0})
    load_recipe(recipe)


def test_references_and_adapters():
    recipe = recipe_of(
        {
            "merge_method": "linear",
            "models": [
                {"model": "owner/a@main+owner/lora", "parameters": {"weight": 1}},
                {
                    "model": {"model": {"path": "b", "revision": "x"}, "lora": "c"},
                    "parameters": {"weight": 2},
                },
            ],
        }
    )
    assert recipe["models"] == [
        {"model": "owner/a@main", "adapter": "owner/lora", "weight": 1.0},
        {"model": "b@x", "adapter": "c", "weight": 2.0},
    ]


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "out_dtype": "torch.float16"}, "float16"),
    ],
)
def test_dtype(keys, dtype):
    assert recipe_of({**config("karcher", "a", "b"), **keys}).get("dtype") == dtype


def test_what_changes_no_number_is_left_out_and_named():
    given = {
        **config("ties", A, B, int8_mask=True, t=0.3),
        "lazy_unpickle": True,
        "tokenizer": {"source": "base"},
        "chat_template": "auto",
    }
    found = convert(given)
    assert set(found.recipe) == {"method", "base", "models", "parameters"}
    for word in ("lazy_unpickle", "int8_mask", "parameters.t", "vocabularies", "chat_template"):
        assert any(word in note for note in found.notes), word


# --- layers -----------------------------------------------------------------------------------

GRADIENT = config("slerp", "a", t=[0, 1])


def test_a_gradient_needs_the_number_of_layers():
    (problem,) = problems_of(GRADIENT)
    assert "parameters.t" in problem and "--layers N" in problem
    ranges = [o["match"]["layers"] for o in recipe_of(GRADIENT, layers=3)["overrides"]]
    assert ranges == ["1", "2"]
    assert recipe_of(GRADIENT, layers=1)["overrides"][0]["parameters"] == {"t": 1.0}


def test_the_local_checkpoint_tells_the_number_of_layers(family, tmp_path):
    given = config("slerp", "elsewhere/a", base=family["base"], t=[0, 1])
    assert len(recipe_of(given)["overrides"]) == 3
    (problem,) = problems_of(given, layers=5)
    assert problem == "--layers: 5: the models have 4 layers"
    (tmp_path / "base" / "model.safetensors").unlink()  # the config alone does as well
    assert look_at(family["base"]).sites is None
    assert len(recipe_of(given)["overrides"]) == 3


def test_a_gradient_over_a_multimodal_model(checkpoints):
    base, other = checkpoints("qwen2_vl"), checkpoints("qwen2_vl", own="other")
    given = config("slerp", str(other), base=str(base), t=[0, 1])
    (problem,) = problems_of(given)
    assert "towers" in problem and "--layers N" in problem
    recipe = recipe_of(given, layers=2)
    plan = build_plan(load_recipe(recipe))
    moved = {job.output.name for job in plan.jobs if job.parameters["t"] == 1}
    assert moved and all("layers.1." in name for name in moved)


def test_a_filter_that_fits_no_tensor(family):
    setting = [{"filter": "experts", "value": 1}, {"value": 0.5}]
    (problem,) = problems_of(config("slerp", "a", t=setting))
    assert "filter: experts" in problem and "local folder" in problem
    found = convert(config("slerp", "a", base=family["base"], t=setting))
    assert "overrides" not in found.recipe and "'experts'" in found.notes[0]


def test_a_head_that_is_tied_has_no_override(family, tmp_path):
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    setting = [{"filter": "lm_head", "value": 1}, {"value": 0.5}]
    assert "overrides" not in recipe_of(config("slerp", "a", base=family["base"], t=setting))
    assert any("lm_head" in note for note in convert(config("slerp", "a", t=setting)).notes)


# --- refusals ---------------------------------------------------------------------------------

SLICE = {"model": "a", "layer_range": [0, 8]}
OTHER = {"model": "b", "layer_range": [0, 9]}
REFUSED = {
    "densities": (
        config("ties", ("a", {"weight": 1, "density": 0.2}), B, density=0.5),
        "parameters.density: [0.2, 0.5]: one density for all models",
    ),
    "ties rescale": (config("ties", A, B, density=0.5, rescale=True), "parameters.rescale: true"),
    "della epsilon": (config("della", A, B, density=0.5), "density: 0.5 and epsilon: 0.3"),
    "gamma": (config("breadcrumbs", A, B, density=0.9, gamma=0.2), "give at most 0.1"),
    "filter_wise": (config("model_stock", "a", "b", filter_wise=True), "parameters.filter_wise"),
    "nuslerp rows": (config("nuslerp", A, B, base=None, nuslerp_flatten=False), "nuslerp_flatten"),
    "nuslerp base": (config("nuslerp", A, B), "base_model: base: nuslerp works on the models"),
    "multislerp": (
        config("multislerp", A, B, base=None, normalize_weights=False),
        "parameters.normalize_weights: false",
    ),
    "eps": (config("multislerp", A, B, base=None, eps=0.1), "parameters.eps: 0.1"),
    "zero sum": (config("linear", A, ("b", {"weight": -1}), base=None), "they sum to zero"),
    "out of range": (config("slerp", "a", t=2), "parameters.t: 2.0 is not in [0, 1]"),
    "not a number": (config("slerp", "a", t="much"), "parameters.t: much: is not a number"),
    "not a truth": (config("linear", A, base=None, normalize="no way"), "is not true or false"),
    "not whole": (config("karcher", "a", base=None, max_iter=2.5), "is no whole number"),
    "missing weight": (config("linear", A, "b", base=None), "models.1.parameters.weight: missing"),
    "no default": (
        config("slerp", "a", t=[{"filter": "mlp", "value": 0.5}]),
        "parameters.t: missing for some tensors",
    ),
    "no base": (config("slerp", "a", base=None, t=0.5), "base_model: missing"),
    "a base of no use": (config("passthrough", "a"), "2 of them: passthrough takes exactly 1"),
    "too many": (config("slerp", "a", "b", t=0.5), "2 of them: slerp takes exactly 1"),
    "twice": (config("linear", A, A, base=None), "models: a: is listed twice"),
    "no such method": (config("ram", "a"), "merge_method: ram: there is no method"),
    "a typo in a method": (config("liner", A), "did you mean 'linear'?"),
    "adapter on the base": (config("ties", A, base="base+lora"), "base_model: base+lora"),
    "two adapters": (config("karcher", "a+b+c", base=None), "models.0.model: a+b+c"),
    "unknown parameter": (config("ties", A, denisty=0.5), "did you mean 'density'?"),
    "unknown key": ({**config("ties", A), "base_modle": 1}, "did you mean 'base_model'?"),
    "misplaced": ({**config("ties", A), "normalize": True}, "belongs under parameters"),
    "modules": ({"merge_method": "karcher", "modules": {"text": {}}}, "match: {component: ...}"),
    "tokenizer": ({**config("ties", A), "tokenizer_source": "union"}, "tokenizer_source: union"),
    "tokens": (
        {**config("ties", A), "tokenizer": {"source": "base", "tokens": {"x": {}}}},
        "tokenizer.tokens",
    ),
    "template": ({**config("ties", A), "chat_template": "chatml"}, "chat_template: chatml"),
    "dtype": ({**config("ties", A), "dtype": "float64"}, "dtype: float64"),
    "stacked": (
        {"merge_method": "passthrough", "slices": [{"sources": [SLICE]}, {"sources": [OTHER]}]},
        "slices: 2 of them: layers keep their places",
    ),
    "ranges": (
        {"merge_method": "karcher", "slices": [{"sources": [SLICE, OTHER]}]},
        "slices.0.sources.layer_range: [[0, 8], [0, 9]]",
    ),
    "neither": ({"merge_method": "karcher"}, "models: give either models or slices"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    given, message = REFUSED[case]
    (problem,) = problems_of(given)
    assert message in problem


def test_everything_is_refused_at_once():
    own = {"weight": "x", "density": 0.5}
    given = {
        **config("ties", "a", ("b", own), rescale="maybe", lambda_=[0, 1]),
        "tokenizer_source": "union",
        "dtype": "int8",
        "extra": 1,
    }
    words = ("extra", "--layers", "weight: missing", "weight: x", "rescale: maybe")
    problems = problems_of(given)
    for word in (*words, "density: [1.0, 0.5]", "tokenizer_source", "dtype: int8"):
        assert any(word in problem for problem in problems), word


ODD = (None, 3, 1.5, True, "x", [], [3], [None], [[1]], {}, {"x": 1}, [{}], [{"filter": 3}])


@pytest.mark.parametrize("key", ["merge_method", "base_model", "models", "parameters", "slices"])
@pytest.mark.parametrize("value", ODD, ids=str)
def test_odd_values_are_refused_and_not_a_crash(key, value):
    given = {**config("linear", A, B, base=None), key: value}
    within = config("linear", ("a", {"weight": value}), B, base=None)
    model = {**config("linear", A, base=None), "models": [{"model": value, "parameters": value}]}
    slices = {"merge_method": "linear", "slices": [{"sources": value, "parameters": value}]}
    ranges = {"merge_method": "linear", "slices": [{"sources": [{**SLICE, "layer_range": value}]}]}
    for one in (given, within, model, slices, ranges, {**given, "tokenizer": value}):
        try:
            convert(one)
        except ConversionError:
            continue
