"""The compiled kernels against the plain ones, bit by bit, and the numbers that they draw."""

import pytest
import torch

from omnimerge.errors import MethodError
from omnimerge.methods import gather, merge_tensors
from omnimerge.methods._kernels import Band, Compiled, Draw, DrawByRank, Election, Plain
from omnimerge.methods._ops import kth_magnitude
from omnimerge.methods._random import Stream
from omnimerge.methods._statistics import Magnitudes

WEIGHTS = [1.0, 3.0, -0.5]
STREAM = Stream.of(7, "model.layers.0.weight", offset=11)
LOW = torch.tensor([0.5, 1.0, 0.1])
LEFT = {
    "everything": None,
    "a band": Band(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, float("inf")])),
    "from a limit on": Band(LOW),
    "a draw": Draw(STREAM, 0.3),
    "nothing": Draw(STREAM, 0.0),
    "a draw by rank": DrawByRank(STREAM, 0.3, 0.5),
}
DTYPES = [
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float16, torch.float64, torch.float8_e5m2),
]


@pytest.fixture
def tau():
    """(models, rows, n), with equal magnitudes, zeros and sums that cancel."""
    drawn = torch.randn(3, 30, 211, generator=torch.Generator().manual_seed(0))
    drawn[:, 0, :40] = torch.tensor([3.0, -1.0, 0.0])[:, None]  # 3 - 3 + 0 cancels
    drawn[1, 1] = drawn[0, 1].flip(0)
    drawn[2, :, 5] = -0.0
    return drawn


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def of_types(dtypes, shape):
    generator = torch.Generator().manual_seed(2)
    base, *models = (torch.randn(shape, generator=generator).to(dtype) for dtype in dtypes)
    return models, base


@pytest.mark.parametrize(("left", "election"), [
    (left, election)
    for left in LEFT
    for election in (None, *(Election(m, sign) for m in (True, False) for sign in (-1.0, 0.0, 1.0)))
    if not (left == "a draw by rank" and election and election.majority)  # no method takes both
], ids=str)  # fmt: skip
def test_merges(tau, left, election):
    before = tau.clone()
    for base in (None, torch.full(tau.shape[1:], 0.25)):
        plain, compiled = (
            kernels.merge(list(tau), base, WEIGHTS, LEFT[left], election)
            for kernels in (Plain(), Compiled())
        )
        assert same_bits(plain, compiled)
        assert torch.equal(tau, before)
        if base is not None:
            moved = [
                kernels.merge(list(tau), base, WEIGHTS, LEFT[left], election, 0.7)
                for kernels in (Plain(), Compiled())
            ]
            assert same_bits(*moved) and same_bits(moved[0], base.add(plain, alpha=0.7))
        assert (left == "everything") or int((plain == 0).sum())
        assert (left == "nothing") == (not plain.any())


def test_signs_are_counted(tau):
    for base in (None, tau[1] / 3):
        found = [k.count_signs(list(tau), base, WEIGHTS, LOW) for k in (Plain(), Compiled())]
        summed = Plain().merge(list(tau), base, WEIGHTS, Band(LOW))
        assert found == [int(summed.sign().sum())] * 2 != [0, 0]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_combinations_round_once(dtypes):
    models, base = of_types(dtypes, (3, 5_001))
    models, weights = [*models, models[0] * 2], [0.3, -1.7, 1e-3]
    exact = base.double() + sum(
        float(torch.tensor(w)) * (m.float() - base.float()).double()
        for m, w in zip(models, weights, strict=True)
    )
    for origin in (None, base):
        plain, compiled = (k.combine(models, origin, weights) for k in (Plain(), Compiled()))
        assert same_bits(plain, compiled) and plain.dtype == torch.float32
    torch.testing.assert_close(plain, exact.float(), rtol=1e-6, atol=1e-6)
    wide = torch.tensor([1 + 2.0**-12])  # its square, 1 + 2^-11 + 2^-24, needs 25 bits
    for kernels in (Plain(), Compiled()):
        found = kernels.combine([torch.tensor([-1 - 2.0**-11]), wide], None, [1.0, float(wide)])
        assert found.item() == 2.0**-24


@pytest.mark.parametrize("row", [
    torch.zeros(9),
    torch.full((9,), -2.5),
    torch.tensor([1e-45, -3e-45, 0.0, 3.4e38, -3.4e38, 1.0, 1e-45, -0.0, 2.0]),  # all 31 bits
    torch.arange(9.0) - 4,  # 2 bits, and equal ones
    torch.tensor([3.0]),
    torch.arange(-150.0, 150.0),  # fewer bits than a digit has
    (torch.arange(3000) % 1700 - 850).float() / 7,  # three digits
    (torch.arange(3000) % 1700 - 850).bfloat16().float().mul(3).bfloat16().float(),  # two
    torch.cat([torch.arange(1.0, 70_001), torch.zeros(9)]),  # longer than positions of 16 bits
])  # fmt: skip
def test_ranks_of_odd_rows(row):
    models, draw = [row.repeat(max(1, 4500 // len(row)), 1)], DrawByRank(STREAM, 0.5, 0.9)
    plain, compiled = (k.merge(models, None, [1.0], draw) for k in (Plain(), Compiled()))
    assert same_bits(plain, compiled)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_differences_of_any_types(dtypes):
    models, base = of_types(dtypes, (10_007,))
    expected = torch.stack([model.float() - base.float() for model in models])
    for kernels in (Plain(), Compiled()):
        found = [
            each.clone() for each in kernels.differences(models, base, 4_000, torch.empty(8_000))
        ]
        assert [each.shape[1] for each in found] == [4_000, 4_000, 2_007]
        assert torch.equal(torch.cat(found, dim=1), expected)
        assert torch.equal(kernels.merge(models, base, [1.0, 0.0]), expected[0])


def test_tensors_of_different_sizes_are_refused():
    for models, base in (([torch.ones(9), torch.ones(8)], None), ([torch.ones(9)], torch.ones(8))):
        with pytest.raises(MethodError, match="different shapes"):
            Compiled().combine(models, base, [1.0, 1.0])
        with pytest.raises(MethodError, match="different shapes"):
            Compiled().merge(models, base, [1.0, 1.0])
    with pytest.raises(MethodError, match="there are 3 weights for 2 models"):
        Compiled().merge([torch.ones(9)] * 2, None, [1.0] * 3)


def test_tensors_that_are_not_contiguous():
    wide = torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    models, base = [wide[:, ::2].T, wide[:, 1::2].T], wide[:, :30].T
    for kernels in (Plain(), Compiled()):
        found = kernels.combine(models, base, [1.0, 1.0])
        assert torch.equal(found, base + (models[0] - base) + (models[1] - base))


def test_counts(tau):
    models = list(tau)
    models[1] = models[1].bfloat16().float()  # the lower bits are zero
    upper = [torch.zeros(3, 1 << 17, dtype=torch.int64) for _ in range(2)]
    for kernels, counts in zip((Plain(), Compiled()), upper, strict=True):
        kernels.count_upper(models, None, counts)
    assert torch.equal(*upper) and upper[0].sum(dim=1).tolist() == [tau[0].numel()] * 3
    whole = [int((model.view(torch.int32) & 0x7FFF == 0).sum()) for model in models]
    assert upper[0][:, ::2].sum(dim=1).tolist() == whole and whole[1] == tau[0].numel()
    bins = upper[0].view(3, -1, 2).sum(dim=2).argmax(dim=1).repeat(2, 1)
    bins[1, 1] = -1
    lower = [torch.zeros(2, 3, 1 << 15, dtype=torch.int64) for _ in range(2)]
    for kernels, counts in zip((Plain(), Compiled()), lower, strict=True):
        kernels.count_lower(models, None, bins, counts)
    assert torch.equal(*lower)
    expected = upper[0].view(3, -1, 2).sum(dim=2).amax(dim=1).repeat(2, 1)
    expected[1, 1] = 0
    assert torch.equal(lower[0].sum(dim=2), expected)


def test_a_second_look_is_taken_only_where_it_tells_more():
    for dtype, idle in ((torch.bfloat16, True), (torch.float32, False)):
        model = torch.arange(1.0, 200.0).mul(1 / 3).to(dtype)
        counted = Magnitudes(1, lambda n: [n // 5], "tensor")
        gather(counted, lambda: [([model], torch.zeros_like(model))])  # noqa: B023 called at once
        assert counted.idle(1) == idle
        assert counted.thresholds.item() == kth_magnitude(model.float(), 199 // 5)


@pytest.mark.parametrize("kernels", [Plain(), Compiled()], ids=["plain", "compiled"])
def test_nan_and_infinity_come_through(kernels):
    for value in (float("nan"), float("inf")):
        tau = torch.ones(2, 4)
        tau[0, 1] = value
        for left in (None, Band(torch.zeros(2), torch.ones(2)), Draw(STREAM, 0.0)):
            for election in (None, Election(mean=True), Election(mean=False)):
                merged = kernels.merge(list(tau), None, [1.0, 1.0], left, election)
                assert merged.isfinite().tolist() == [True, False, True, True]


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
