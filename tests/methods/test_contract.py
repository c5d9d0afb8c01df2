"""What every merge method must satisfy. New methods are picked up from the registry."""

import inspect

import pytest
import torch

from omnimerge.errors import MethodError
from omnimerge.methods import (
    LowRank,
    Place,
    adamms,
    all_methods,
    gather,
    merge_state_dicts,
    merge_tensors,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
# Of equal models these give the model; the others scale or sparsify its task vector.
MEANS = {"adamms", "average", "karcher", "linear", "model_stock", "multislerp", "nuslerp"}
SHAPES = [(7,), (4, 6), (2, 3, 5), (), (0,), (0, 4)]


@pytest.fixture(params=sorted(all_methods()))
def method(request):
    return all_methods()[request.param]


def parameters(method):
    """Every required keyword, at the middle of its range."""
    return {
        p.name: (p.range.low + p.range.high) / 2 if p.range else 0.5
        for p in method.params
        if p.required
    }


def count(method):
    return min(3, method.models[1] or 3)


def values(method):
    """How many values a keyword with one per model takes."""
    return count(method) - method.takes_target


def draw(method, shape, seed=0, dtype=torch.float32):
    """Models and a base; models are factors where the method merges nothing else."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count(method) + 1)]
    models = [_factors(t) for t in tensors[1:]] if method.adapters_only else tensors[1:]
    return models, tensors[0]


def _factors(tensor):
    rows = tensor.shape[0] if tensor.ndim else 1
    matrix = tensor.float().reshape(rows, tensor.numel() // max(1, rows))
    return LowRank(matrix[:, :2].contiguous(), matrix[:2].contiguous()[: matrix[:, :2].shape[1]])


def call(method, models, base, **keywords):
    return merge_tensors(method.name, models, base, **keywords)


def parts(value):
    return [value.left, value.right] if isinstance(value, LowRank) else [value]


def test_the_registry_is_not_empty():
    assert {"adamms", "linear", "average", "task_arithmetic"} <= set(all_methods())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_dtype_and_finiteness(method, shape, dtype):
    models, base = draw(method, shape, dtype=dtype)
    merged = call(method, models, base, **parameters(method))
    assert merged.shape == torch.Size(shape)
    assert merged.dtype == torch.float32
    assert merged.isfinite().all()


def test_merging_copies_of_the_base_returns_the_base(method):
    _, base = draw(method, (4, 6))
    copies = [base.clone() for _ in range(count(method))]
    if method.adapters_only:
        copies = [LowRank(torch.ones(4, 2), torch.zeros(2, 6)) for _ in copies]
    merged = call(method, copies, base, **parameters(method))
    torch.testing.assert_close(merged, base)


def test_equal_models(method):
    models, base = draw(method, (4, 6))
    merged = call(method, [models[0]] * count(method), base, **parameters(method))
    assert merged.isfinite().all()
    if method.name in MEANS:
        torch.testing.assert_close(merged, models[0])


def test_a_single_model(method):
    models, base = draw(method, (4, 6))
    if method.models[0] > 1:
        with pytest.raises(MethodError, match="models, not 1"):
            call(method, models[:1], base, **parameters(method))
        return
    merged = call(method, models[:1], base, **parameters(method))
    assert merged.shape == base.shape and merged.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(method, value):
    models, base = draw(method, (4, 6))
    part = parts(models[-1])[0].clone()
    part[1, 1] = value
    spoilt = LowRank(part, models[-1].right) if method.adapters_only else part
    where = f"of model {len(models) - 1} holds NaN or infinity"
    with pytest.raises(MethodError, match=where):
        call(method, [*models[:-1], spoilt], base, **parameters(method))
    with pytest.raises(MethodError, match="of the base holds NaN or infinity"):
        call(method, models, base * value, **parameters(method))


def test_inputs_are_not_modified(method):
    models, base = draw(method, (4, 6))
    inputs = [part for value in (*models, base) for part in parts(value)]
    before = [part.clone() for part in inputs]
    call(method, models, base, **parameters(method))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


def test_the_result_is_a_new_tensor(method):
    models, base = draw(method, (4, 6))
    merged = call(method, models, base, **parameters(method))
    inputs = [part for value in (*models, base) for part in parts(value)]
    assert merged.data_ptr() not in {part.data_ptr() for part in inputs}


def test_same_inputs_give_the_same_bits(method):
    models, base = draw(method, (4, 6))
    chosen = parameters(method)
    assert torch.equal(call(method, models, base, **chosen), call(method, models, base, **chosen))


def test_methods_may_be_applied_in_the_slices_that_they_allow(method):
    if method.slices == "whole":
        return
    models, base = draw(method, (8, 16))
    chosen = parameters(method)
    whole = call(method, models, base, **chosen)
    known = method.new_statistics(len(models), chosen)
    if known:
        gather(known, lambda: [(models, base)])
    cut = 5 if method.slices == "rows" else 70  # five rows, or four and a bit
    inputs = [t if method.slices == "rows" else t.flatten() for t in (*models, base)]
    halves = [
        method.merge(
            [m[part] for m in inputs[:-1]],
            inputs[-1][part],
            chosen,
            statistics=known,
            place=Place(offset=part.start * (16 if method.slices == "rows" else 1)),
        )
        for part in (slice(0, cut), slice(cut, len(inputs[0])))
    ]
    assert torch.equal(whole.flatten(), torch.cat(halves).flatten())


@pytest.mark.parametrize(
    "name", [(m.name, p.name) for m in all_methods().values() for p in m.params], ids="-".join
)
def test_every_parameter_has_an_effect(name):
    method = all_methods()[name[0]]
    p = next(p for p in method.params if p.name == name[1])
    # Two layers, so that what depends on the whole model or on depth shows; unequal weights that
    # do not sum to one, so that `normalize` matters too.
    whole = {f"layers.{i}.w": draw(method, (8, 12), seed=i) for i in range(2)}
    models = [{n: m[i] for n, (m, _) in whole.items()} for i in range(count(method))]
    base = {n: b for n, (_, b) in whole.items()}
    chosen = {**parameters(method), **ACTIVE.get(name, {})}
    if any(q.per_model for q in method.params):
        chosen["weights"] = [1.0, 3.0, 0.5][: values(method)]

    def run(**changes):
        merged = merge_state_dicts(method.name, models, base, **{**chosen, **changes})
        return torch.cat([t.flatten() for t in merged.values()])

    reference = run()
    changed = [run(**{p.name: other}) for other in _others(p, values(method))]
    assert any(not torch.equal(c, reference) for c in changed)


# What else has to be set for a keyword to matter.
ACTIVE = {
    ("optmerge", "momentum"): {"variant": "lora"},
}


def _others(p, models):
    """Values of a keyword, other than its default, of which one at least has to matter."""
    if p.per_model:
        return [[2.0, 1.0, 1.0][:models]]
    if p.kind is bool:
        return [not p.default]
    if p.choices:
        return [choice for choice in p.choices if choice != p.default]
    if p.kind is int:
        return [1, p.default + 1]
    return [p.range.low + share * (p.range.high - p.range.low) for share in (0, 0.05, 0.9)]


def test_the_seed_matters_for_random_methods_only(method):
    models, base = draw(method, (4, 6))
    chosen = {**parameters(method), **({"inner": "dare_ties"} if method.name == "knots" else {})}
    first, second = (call(method, models, base, seed=seed, **chosen) for seed in (0, 1))
    assert torch.equal(first, second) is not method.random


def test_whole_models_are_merged_tensor_by_tensor(method):
    pairs = {"w": draw(method, (4, 6)), "b": draw(method, (5,), seed=1)}
    models = [{name: m[i] for name, (m, _) in pairs.items()} for i in range(count(method))]
    base = {name: b for name, (_, b) in pairs.items()}
    merged = merge_state_dicts(method.name, models, base, **parameters(method))
    assert list(merged) == ["w", "b"]
    if method.statistics is None and not method.random:
        for name, (m, b) in pairs.items():
            assert torch.equal(merged[name], call(method, m, b, **parameters(method)))
    with pytest.raises(MethodError, match="1 tensors are not in every model, such as 'b'"):
        merge_state_dicts(method.name, models, {"w": base["w"]}, **parameters(method))


def test_wrong_calls_are_explained(method):
    models, base = draw(method, (4, 6))
    with pytest.raises(MethodError, match="no such parameter"):
        call(method, models, base, **parameters(method), alhpa=1)
    wrong = models[-1].right.T if method.adapters_only else models[-1].T
    with pytest.raises(MethodError, match="different shapes"):
        call(method, [*models[:-1], wrong], base, **parameters(method))
    with pytest.raises(MethodError, match="models"):
        call(method, [], base, **parameters(method))
    for p in method.params:
        if p.range:
            value = p.range.high + 1
            value = [value] * values(method) if p.per_model else value
            with pytest.raises(MethodError, match=f"{p.name}: .* is not in"):
                call(method, models, base, **{**parameters(method), p.name: value})


def test_is_documented(method):
    doc = inspect.getdoc(method.fn)
    assert method.paper.startswith("https://")
    assert "Reference:" in doc
    assert "Differences from the authors' code:" in doc
    assert all(f"{p.name}:" in doc for p in method.params)


def test_a_method_without_its_base_is_refused():
    with pytest.raises(MethodError, match="needs a base"):
        merge_tensors("task_arithmetic", [torch.ones(2)])


def test_merge_tensors_names_the_closest_method():
    with pytest.raises(Exception, match="did you mean 'linear'"):
        merge_tensors("liner", [torch.ones(2)])


def test_shapes_are_checked_at_run_time_in_the_tests():
    # adamms never looks at the base, so only the annotation can notice. (Of a sequence, the
    # checker looks at one element drawn at random.)
    with pytest.raises(Exception, match=r"(?i)type-check"):
        adamms([torch.ones(2), torch.ones(2)], torch.ones(3), alpha=0.0)
