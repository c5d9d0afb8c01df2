"""The compiled loops against the plain ones, bit by bit, and the numbers that they draw."""

import pytest
import torch

from omnimerge.errors import MethodError
from omnimerge.methods import gather, merge_tensors
from omnimerge.methods._kernels import Compiled, Plain
from omnimerge.methods._ops import kth_magnitude
from omnimerge.methods._random import Stream
from omnimerge.methods._statistics import Magnitudes

WEIGHTS = [1.0, 3.0, -0.5]
STREAM = Stream.of(7, "model.layers.0.weight", offset=11)
IN_PLACE = {
    "band": (torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, float("inf")])),
    "drop": (STREAM, 0.3),
    "drop_by_rank": (STREAM, 0.3, 0.5),
}


@pytest.fixture
def tau():
    """(models, rows, n), with equal magnitudes, zeros and sums that cancel."""
    drawn = torch.randn(3, 30, 211, generator=torch.Generator().manual_seed(0))
    drawn[:, 0, :40] = torch.tensor([3.0, -1.0, 0.0])[:, None]  # 3 - 3 + 0 cancels
    drawn[1, 1] = drawn[0, 1].flip(0)
    drawn[2, :, 5] = -0.0
    return drawn


@pytest.mark.parametrize("name", IN_PLACE)
def test_loops_in_place(name, tau):
    plain, compiled = tau.clone(), tau.clone()
    getattr(Plain(), name)(plain, *IN_PLACE[name])
    getattr(Compiled(), name)(compiled, *IN_PLACE[name])
    assert torch.equal(plain, compiled)
    assert 0 < int((plain == 0).sum()) < plain.numel()


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("majority", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("low", [None, torch.tensor([0.5, 1.0, 0.1])])
def test_elected_sums(tau, mean, majority, low):
    before = tau.clone()
    plain, compiled = (
        loops.elected_sum(tau, WEIGHTS, mean=mean, majority=majority, low=low)
        for loops in (Plain(), Compiled())
    )
    assert torch.equal(plain, compiled)
    assert Plain().count_signs(tau, WEIGHTS, low) == Compiled().count_signs(tau, WEIGHTS, low)
    assert torch.equal(tau, before)


@pytest.mark.parametrize("row", [
    torch.zeros(9),
    torch.full((9,), -2.5),
    torch.tensor([1e-45, -3e-45, 0.0, 3.4e38, -3.4e38, 1.0, 1e-45, -0.0, 2.0]),  # all 31 bits
    torch.arange(9.0) - 4,  # 2 bits, and equal ones
    torch.tensor([3.0]),
])  # fmt: skip
def test_ranks_of_odd_rows(row):
    tau = row.repeat(1, 500, 1)
    plain, compiled = tau.clone(), tau.clone()
    Plain().drop_by_rank(plain, STREAM, 0.5, 0.9)
    Compiled().drop_by_rank(compiled, STREAM, 0.5, 0.9)
    assert torch.equal(plain, compiled)


@pytest.mark.parametrize("dtypes", [
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float16, torch.float64, torch.float8_e5m2),
], ids=str)  # fmt: skip
def test_differences_of_any_types(dtypes):
    generator = torch.Generator().manual_seed(2)
    base, *models = (torch.randn(10_007, generator=generator).to(dtype) for dtype in dtypes)
    expected = torch.stack([model.float() - base.float() for model in models])
    for loops in (Plain(), Compiled()):
        found = [
            each.clone() for each in loops.differences(models, base, 4_000, torch.empty(8_000))
        ]
        assert [each.shape[1] for each in found] == [4_000, 4_000, 2_007]
        assert torch.equal(torch.cat(found, dim=1), expected)


def test_counts(tau):
    upper = [torch.zeros(3, 1 << 16, dtype=torch.int64) for _ in range(2)]
    for loops, counts in zip((Plain(), Compiled()), upper, strict=True):
        loops.count_upper(tau, counts)
    assert torch.equal(*upper) and int(upper[0].sum()) == tau.numel()
    bins = upper[0].argmax(dim=1).repeat(2, 1)
    lower = [torch.zeros(2, 3, 1 << 15, dtype=torch.int64) for _ in range(2)]
    for loops, counts in zip((Plain(), Compiled()), lower, strict=True):
        loops.count_lower(tau, bins, counts)
    assert torch.equal(*lower)
    assert torch.equal(lower[0].sum(dim=2), upper[0].amax(dim=1).repeat(2, 1))


@pytest.mark.parametrize("loops", [Plain(), Compiled()], ids=["plain", "compiled"])
def test_nan_and_infinity_come_through(loops):
    for value in (float("nan"), float("inf")):
        tau = torch.ones(2, 4)
        tau[0, 1] = value
        for name, arguments in {
            "band": (torch.zeros(2), torch.ones(2)),
            "drop": (STREAM, 0.0),
        }.items():
            spoilt = tau.clone()
            getattr(loops, name)(spoilt, *arguments)
            assert spoilt[0, 1].isnan()
        assert not loops.elected_sum(tau, [1.0, 1.0], mean=True)[1].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_are_those_of_a_sort(dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = [(70, 1000), (5,), (3, 3)]
    base = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    models = [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(2)]
    counted = Magnitudes(2, lambda n: [1, n // 3, n, 0], "model")
    gather(counted, lambda: [([m[i] for m in models], base[i]) for i in range(3)])
    for t, model in enumerate(models):
        tau = torch.cat(
            [(m.float() - b.float()).flatten() for m, b in zip(model, base, strict=True)]
        )
        wanted = [kth_magnitude(tau, k) for k in (1, len(tau) // 3, len(tau), 0)]
        assert counted.thresholds[:, t].tolist() == wanted


def test_magnitudes_refuse_what_is_not_finite():
    counted = Magnitudes(1, lambda n: [1], "tensor")
    with pytest.raises(MethodError, match="holds NaN or infinity"):
        gather(counted, lambda: [([torch.tensor([1.0, float("nan")])], torch.zeros(2))])


def test_what_is_drawn_is_uniform_and_independent():
    drawn = STREAM.uniform(2, (200_000,))
    assert float(drawn.min()) >= 0 and float(drawn.max()) < 1
    assert drawn.mean(dim=1).tolist() == pytest.approx([0.5, 0.5], abs=0.005)
    assert drawn.var(dim=1).tolist() == pytest.approx([1 / 12, 1 / 12], abs=0.002)
    assert abs(float(torch.corrcoef(drawn)[0, 1])) < 0.01
    neighbours = torch.corrcoef(torch.stack([drawn[0, 1:], drawn[0, :-1]]))
    assert abs(float(neighbours[0, 1])) < 0.01
    other = Stream.of(8, "model.layers.0.weight", offset=11).uniform(1, (200_000,))
    assert abs(float(torch.corrcoef(torch.cat([drawn[:1], other]))[0, 1])) < 0.01
    later = Stream.of(7, "model.layers.0.weight", offset=16).uniform(2, (10,))
    assert torch.equal(later, drawn[:, 5:15])


def test_methods_do_not_need_numba(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base, *models = (torch.randn(20, 30, generator=generator) for _ in range(4))
    names = ("ties", "dare_ties", "della", "breadcrumbs")
    compiled = [merge_tensors(name, models, base, density=0.4) for name in names]
    monkeypatch.setattr("omnimerge.methods._kernels._compiled", lambda: None)
    plain = [merge_tensors(name, models, base, density=0.4) for name in names]
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))
