"""TIES, DARE and MetaGPT: by hand, and by their statistics."""

import pytest
import torch

from omnimerge.errors import MethodError
from omnimerge.methods import (
    arcee_fusion,
    consensus_ta,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    drop_linear,
    merge_state_dicts,
    merge_tensors,
    metagpt,
    task_arithmetic,
    ties,
)
from omnimerge.methods._ops import kth_magnitude


def tensor(*values):
    return torch.tensor(values)


BASE = torch.full((4,), 10.0)
MODELS = [
    BASE + tensor(4.0, 1.0, -3.0, 2.0),  # trimmed to a half: [4, 0, -3, 0]
    BASE + tensor(6.0, 1.0, 2.0, -1.0),  # trimmed to a half: [6, 0,  2, 0]
]


def test_ties_by_hand():
    # index 0: both agree on +, (1·4 + 3·6) / (1 + 3) = 5.5
    # index 2: -3 + 3·2 > 0 elects +, so only the second model counts: 2
    merged = ties(MODELS, BASE, weights=[1.0, 3.0], density=0.5, scale=0.5)
    torch.testing.assert_close(merged, BASE + 0.5 * tensor(5.5, 0.0, 2.0, 0.0))


def test_ties_sum_does_not_divide():
    merged = ties(MODELS, BASE, weights=[1.0, 3.0], density=0.5, merge="sum")
    torch.testing.assert_close(merged, BASE + tensor(22.0, 0.0, 6.0, 0.0))


def test_ties_exact_cancellation_follows_the_majority():
    # index 1 cancels; index 0 and 2 elect -, so the majority is -, and only the -2 is left there.
    models = [BASE + tensor(-3.0, 2.0, -3.0, 0.0), BASE + tensor(-3.0, -2.0, -3.0, 0.0)]
    merged = ties(models, BASE, density=1.0)
    torch.testing.assert_close(merged, BASE + tensor(-3.0, -2.0, -3.0, 0.0))


@pytest.mark.parametrize(
    ("scope", "density", "kept"),
    [
        ("exact", 0.0, 0), ("exact", 0.25, 2), ("exact", 1.0, 10),
        # 10 - int(7.5) + 1, and int(2.5) + 1
        ("tensor", 0.25, 4), ("tensor", 1.0, 10), ("model", 0.25, 3), ("model", 1.0, 10),
    ],
)  # fmt: skip
def test_ties_keeps_the_share_of_each_published_rule(scope, density, kept):
    base, model = torch.zeros(10), torch.arange(1.0, 11.0)
    merged = merge_tensors("ties", [model], base, density=density, threshold_scope=scope)
    assert int(merged.count_nonzero()) == kept
    assert merged[10 - kept :].tolist() == model[10 - kept :].tolist()


def test_ties_over_the_whole_model_equals_ties_over_its_concatenation():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 9), "b": (40,), "c": (3, 5, 2)}
    scales = {"a": 1.0, "b": 10.0, "c": 0.1}  # the threshold takes most of b and nothing of c
    draw = {
        n: [torch.randn(s, generator=generator) * scales[n] for _ in range(4)]
        for n, s in shapes.items()
    }
    models = [{n: t[i] for n, t in draw.items()} for i in range(3)]
    base = {n: t[3] for n, t in draw.items()}
    options = {"density": 0.3, "threshold_scope": "model", "scale": 0.7, "weights": [1.0, 2.0, 0.5]}
    merged = merge_state_dicts("ties", models, base, **options)

    flat = [torch.cat([t[i].flatten() for t in draw.values()]) for i in range(4)]
    expected = merge_tensors("ties", flat[:3], flat[3], **options)
    got = torch.cat([merged[name].flatten() for name in draw])
    torch.testing.assert_close(got, expected)
    per_tensor = merge_state_dicts("ties", models, base, **{**options, "threshold_scope": "exact"})
    assert not torch.equal(per_tensor["b"], merged["b"])


def test_kth_magnitude():
    values = tensor(-5.0, 1.0, 3.0, -3.0)
    assert [kth_magnitude(values, k) for k in (0, 1, 2, 3, 4)] == [float("inf"), 5, 3, 3, 1]


def test_metagpt_by_hand():
    # Squared norms over the model: 9 + 16 = 25 and 75, so the weights are 1/4 and 3/4.
    base = {"a": torch.zeros(1), "b": torch.zeros(1)}
    models = [{"a": tensor(3.0), "b": tensor(4.0)}, {"a": tensor(0.0), "b": tensor(75.0).sqrt()}]
    merged = merge_state_dicts("metagpt", models, base, scale=2.0)
    torch.testing.assert_close(merged["a"], tensor(1.5))
    torch.testing.assert_close(merged["b"], 2.0 * (0.25 * 4 + 0.75 * tensor(75.0).sqrt()))
    alone = metagpt([m["b"] for m in models], base["b"])  # one tensor is its own model
    torch.testing.assert_close(alone, (16 * 4 + 75 * tensor(75.0).sqrt()) / 91)


def test_dare_drops_the_share_and_rescales():
    base, models = torch.zeros(100_000), [torch.ones(100_000), torch.full((100_000,), 2.0)]
    merged = merge_tensors("dare_linear", models, base, density=0.2, scale=0.5, weights=[1.0, 3.0])
    # each model is kept with 0.2 and scaled by 5: values 0, 2.5, 15 and 17.5
    counts = {v: float((merged == v).float().mean()) for v in (0.0, 2.5, 15.0, 17.5)}
    for value, share in ((0.0, 0.64), (2.5, 0.16), (15.0, 0.16), (17.5, 0.04)):
        assert abs(counts[value] - share) < 0.005
    # on average task arithmetic: 0.5 · (1 · 1 + 3 · 2)
    assert abs(float(merged.mean()) - 3.5) < 0.05


def test_dare_that_keeps_everything_is_task_arithmetic():
    options = {"weights": [1.0, 3.0], "scale": 0.5}
    expected = task_arithmetic(MODELS, BASE, **options)
    torch.testing.assert_close(dare_linear(MODELS, BASE, density=1.0, **options), expected)
    mean = drop_linear(MODELS, BASE, density=1.0, scale=0.5)
    torch.testing.assert_close(mean, BASE + 0.5 * tensor(5.0, 1.0, -0.5, 0.5))


def test_dare_ties_that_keeps_everything_is_ties_without_trimming():
    options = {"weights": [1.0, 3.0], "scale": 0.5}
    expected = ties(MODELS, BASE, density=1.0, **options)
    torch.testing.assert_close(dare_ties(MODELS, BASE, density=1.0, **options), expected)


def test_dare_ties_sum_does_not_divide():
    # index 0: both agree, 1·4 + 3·6 = 22; index 1: 1·1 + 3·1 = 4; index 2: -3 + 3·2 > 0 elects +,
    # so 3·2 = 6 alone; index 3: 2 - 3·1 < 0 elects -, so 3·(-1) = -3 alone
    options = {"weights": [1.0, 3.0], "scale": 0.5, "density": 1.0, "merge": "sum"}
    expected = BASE + 0.5 * tensor(22.0, 4.0, 6.0, -3.0)
    torch.testing.assert_close(dare_ties(MODELS, BASE, **options), expected)
    torch.testing.assert_close(della(MODELS, BASE, epsilon=0.0, **options), expected)


def test_dare_ties_sum_of_what_was_drawn():
    # Each model is kept with 0.5 and doubled: 2·1 with weight 1, and 2·2 with weight 3.
    base, models = torch.zeros(100_000), [torch.ones(100_000), torch.full((100_000,), 2.0)]
    options = {"weights": [1.0, 3.0], "scale": 0.5, "density": 0.5}
    for method, more in (("dare_ties", {}), ("della", {"epsilon": 0.0})):
        merged = merge_tensors(method, models, base, merge="sum", **more, **options)
        for value in (0.0, 0.5 * 2, 0.5 * 12, 0.5 * 14):
            assert abs(float((merged == value).float().mean()) - 0.25) < 0.01
        mean = merge_tensors(method, models, base, **more, **options)
        torch.testing.assert_close(mean.unique(), 0.5 * tensor(0.0, 2.0, 14 / 4, 4.0))


def test_density_zero_is_the_base():
    for method in (dare_linear, dare_ties, drop_linear, ties):
        assert torch.equal(method(MODELS, BASE, density=0.0), BASE)


def test_what_is_drawn_depends_on_seed_and_name_alone():
    models = [{"a": torch.ones(50), "b": torch.ones(50)}]
    base = {"a": torch.zeros(50), "b": torch.zeros(50)}
    first = merge_state_dicts("dare_linear", models, base, seed=3)
    turned = merge_state_dicts(
        "dare_linear", [dict(reversed(models[0].items()))], dict(reversed(base.items())), seed=3
    )
    assert all(torch.equal(first[name], turned[name]) for name in base)
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], merge_state_dicts("dare_linear", models, base)["a"])


def test_models_of_other_names_or_shapes_are_refused():
    with pytest.raises(MethodError, match="tensor 'a' has different shapes"):
        merge_state_dicts("average", [{"a": torch.ones(2)}, {"a": torch.ones(3)}])


def test_integer_tensors_are_the_first_models():
    models = [
        {"n": torch.tensor([1]), "w": torch.ones(1)},
        {"n": torch.tensor([5]), "w": torch.zeros(1)},
    ]
    merged = merge_state_dicts("average", models)
    assert merged["n"].tolist() == [1] and merged["w"].tolist() == [0.5]


def test_consensus_ta_by_hand():
    # τ = (4, 3, 1), (1, 3, -1): the sum is (5, 6, 0). At λ = 0.5 an entry is needed by task t where
    # |τ_t| ≥ 0.5 |τ_other|: entry 0 by the first only, entry 1 by both, entry 2 by both.
    base = torch.full((3,), 10.0)
    models = [base + tensor(4.0, 3.0, 1.0), base + tensor(1.0, 3.0, -1.0)]
    merged = consensus_ta(models, base, threshold=0.5, scale=0.5)
    torch.testing.assert_close(merged, base + 0.5 * tensor(0.0, 6.0, 0.0))
    anyone = consensus_ta(models, base, threshold=0.5, consensus=1)
    torch.testing.assert_close(anyone, base + tensor(5.0, 6.0, 0.0))


def test_della_keeps_by_rank_and_is_unbiased():
    # One row of four, magnitudes in order: kept with 0.5 + 0.4 (-3/8, -1/8, 1/8, 3/8).
    base = torch.zeros(4, 100_000).T.contiguous()
    model = tensor(1.0, 2.0, 3.0, 4.0).expand(100_000, 4)
    options = {"density": 0.5, "epsilon": 0.4}
    merged = merge_tensors("della_linear", [model], base, scale=0.5, **options)
    kept = (merged != 0).float().mean(dim=0)
    torch.testing.assert_close(kept, tensor(0.35, 0.45, 0.55, 0.65), atol=0.01, rtol=0)
    torch.testing.assert_close(merged.mean(dim=0), 0.5 * model[0], atol=0.03, rtol=0)
    values = merged[:, 3].unique()
    torch.testing.assert_close(values, tensor(0.0, 0.5 * 4 / 0.65))


def test_della_that_keeps_everything_is_ties_without_trimming():
    options = {"weights": [1.0, 3.0], "scale": 0.5}
    expected = ties(MODELS, BASE, density=1.0, **options)
    merged = della(MODELS, BASE, density=1.0, epsilon=0.0, **options)
    torch.testing.assert_close(merged, expected)
    linear = della_linear(MODELS, BASE, density=1.0, epsilon=0.0, **options)
    torch.testing.assert_close(linear, task_arithmetic(MODELS, BASE, **options))


def test_arcee_fusion_takes_over_the_outlier_alone():
    base = torch.zeros(10, 10)
    model = base + 1e-3 * torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    model[3, 4] = 1.0
    merged = arcee_fusion([model], base)
    assert merged[3, 4] == 1.0
    assert (merged[[r for r in range(10) if r != 3]] == 0).float().mean() > 0.7
