"""Experts as factors: the same as dense, LoRA methods by hand, LiNeS and PCB by hand."""

import pytest
import torch

from omnimerge.errors import MethodError
from omnimerge.methods import (
    LowRank,
    all_methods,
    consensus_ties,
    knots,
    merge_state_dicts,
    merge_tensors,
    pcb,
    ties,
)
from omnimerge.methods._ops import main_directions

FACTORED = sorted(n for n, m in all_methods().items() if m.low_rank and not m.adapters_only)


def tensor(*values):
    return torch.tensor(list(values))


def factors(shape, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    return LowRank(
        torch.randn(m, rank, generator=generator),
        torch.randn(rank, n, generator=generator) / n**0.5,
    )


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (12, 12)], ids=str)
@pytest.mark.parametrize("name", FACTORED)
def test_factors_merge_as_their_products_do(name, shape):
    deltas = [factors(shape, rank, seed) for seed, rank in enumerate((2, 3, 0))]
    base = torch.zeros(shape)
    dense = [delta.dense() for delta in deltas]
    keywords = {"iterations": 30, "learning_rate": 1e-4} if name == "wudi" else {}
    merged = merge_tensors(name, deltas, base, scale=0.7, **keywords)
    expected = merge_tensors(name, dense, base, scale=0.7, **keywords)
    assert (merged - expected).norm() <= 1e-4 * expected.norm()
    assert expected.norm() > 0.1


@pytest.mark.parametrize("name", [*FACTORED, "robustmerge"])
def test_what_no_adapter_changes_stays_the_bases(name):
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    nothing = LowRank(torch.zeros(6, 0), torch.zeros(0, 8))
    assert torch.equal(merge_tensors(name, [nothing, nothing], base), base)


def test_factors_for_methods_without_a_form_for_them_are_multiplied():
    deltas = [factors((6, 5), 2, seed) for seed in range(2)]
    base = torch.ones(6, 5)
    merged = merge_tensors("ties", deltas, base, density=0.5)
    expected = ties([base + d.dense() for d in deltas], base, density=0.5)
    torch.testing.assert_close(merged, expected)
    mixed = merge_tensors("tsv", [deltas[0], base + deltas[1].dense()], base)
    torch.testing.assert_close(mixed, merge_tensors("tsv", deltas, base), atol=1e-5, rtol=1e-4)


def test_optmerge_full_takes_factors_too():
    deltas = [factors((20, 30), 2, seed) for seed in range(3)]
    base = torch.zeros(20, 30)
    options = {"variant": "full", "iterations": 40, "learning_rate": 1e-3}
    merged = merge_tensors("optmerge", deltas, base, **options)
    expected = merge_tensors("optmerge", [d.dense() for d in deltas], base, **options)
    assert (merged - expected).norm() <= 1e-4 * expected.norm()


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(MethodError, match=r"factors of \(3, 4\) for \(3, 5\)"):
        merge_tensors("tsv", [factors((3, 4), 1, 0)], torch.zeros(3, 5))
    with pytest.raises(MethodError, match="need a base"):
        merge_tensors("linear", [factors((3, 4), 1, 0)])
    spoilt = LowRank(torch.full((3, 1), float("nan")), torch.ones(1, 4))
    with pytest.raises(MethodError, match="of model 0 holds NaN or infinity"):
        merge_tensors("tsv", [spoilt], torch.zeros(3, 4))
    with pytest.raises(MethodError, match="robustmerge merges LoRA adapters"):
        merge_tensors("robustmerge", [torch.ones(3, 4)], torch.zeros(3, 4))


def test_leading_directions_without_a_full_decomposition():
    generator = torch.Generator().manual_seed(0)
    noise = 1e-4 * torch.randn(300, 400, generator=generator)
    matrix = factors((300, 400), 20, 1).dense() + noise
    for given in (matrix, matrix.T):
        u, s, r = main_directions(given, 60)
        few = main_directions(given, 60, negligible=1e-5)
        assert few[0].shape[1] == 20
        torch.testing.assert_close(few[1], s[:20], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(few[0] @ few[2], u[:, :20] @ r[:20], rtol=1e-3, atol=1e-5)
    flat = torch.randn(300, 400, generator=generator)
    assert main_directions(flat, 60, negligible=1e-5)[0].shape[1] == 60  # nothing is negligible


def test_knots_by_hand():
    # Side by side [τ1 τ2] = e1 (5 0 | 3 4) + e2 (0 0 | 0 0): U = e1, P1 = (5, 0), P2 = (3, 4).
    # With the weights 1 and 2 both agree on +: (5 + 2 · 3) / 3 and 2 · 4 / 2.
    base = torch.full((2, 2), 10.0)
    models = [base + tensor([5.0, 0.0], [0.0, 0.0]), base + tensor([3.0, 4.0], [0.0, 0.0])]
    merged = knots(models, base, weights=[1.0, 2.0], density=1.0, scale=0.5)
    expected = base + 0.5 * tensor([11 / 3, 4.0], [0.0, 0.0])
    torch.testing.assert_close(merged, expected)
    # Half of each: P1 keeps 5 and P2 keeps 4.
    merged = knots(models, base, weights=[1.0, 2.0], density=0.5, scale=0.5)
    torch.testing.assert_close(merged, base + 0.5 * tensor([5.0, 4.0], [0.0, 0.0]))


def test_knots_is_ties_in_a_rotated_space():
    # Where both tasks share one column direction, rotating it rotates the result.
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    deltas = [factors((6, 9), 2, seed) for seed in range(3)]
    turned = [LowRank(turn @ d.left, d.right) for d in deltas]
    base = torch.zeros(6, 9)
    straight = merge_tensors("knots", deltas, base, density=0.5)
    torch.testing.assert_close(
        merge_tensors("knots", turned, base, density=0.5), turn @ straight, rtol=1e-4, atol=1e-5
    )


def test_robustmerge_by_hand():
    # The ⌊4 · 0.75⌋ = third smallest is the limit, so two entries of each factor are kept:
    # row 1 of A1, and 6 and 5 of A2.
    one = LowRank(tensor([2.0, 1.0], [1.0, 4.0]), tensor([4.0, 3.0], [1.0, 1.0]))
    two = LowRank(tensor([3.0, 5.0], [1.0, 2.0]), tensor([1.0, 6.0], [5.0, 1.0]))
    # s1 = (7/7, 1 as nothing is left); s2 = (7/6, 6/5). top_share 1: nothing is raised.
    # A = 2 (1 · [[4, 3], [0, 0]] + 0.5 · [[0, 6], [5, 0]]) = [[8, 12], [5, 0]]
    # B1 keeps 2 and 4 of [[2, 1], [1, 4]] (2 is one of the two largest), B2 keeps 3 and 5.
    # B[:, 1] = 2 (1 · 1 · [2, 0] + 0.5 · 7/6 · [3, 0]) / (1 + 7/6)
    # B[:, 2] = 2 (1 · 1 · [0, 4] + 0.5 · 6/5 · [5, 0]) / (1 + 6/5)
    left = torch.stack(
        [tensor(2 * (2 + 3.5 / 2) / (13 / 6), 0.0), tensor(2 * 3.0, 8.0) / 2.2], dim=1
    )
    expected = 10.0 + 0.5 * left @ tensor([8.0, 12.0], [5.0, 0.0])
    merged = merge_tensors(
        "robustmerge", [one, two], torch.full((2, 2), 10.0),
        weights=[1.0, 0.5], density=0.25, top_share=1.0, scale=0.5,
    )  # fmt: skip
    torch.testing.assert_close(merged, expected)
    # top_share 0.5: of two directions the larger s is the limit, so both s of a task are equal.
    raised = merge_tensors(
        "robustmerge", [one, two], torch.full((2, 2), 10.0), density=0.25, top_share=0.5
    )
    s1, s2 = 1.0, 1.2
    left = 2 * (s1 * tensor([2.0, 0.0], [0.0, 4.0]) + s2 * tensor([3.0, 5.0], [0.0, 0.0]))
    right = 2 * (tensor([4.0, 3.0], [0.0, 0.0]) + tensor([0.0, 6.0], [5.0, 0.0]))
    torch.testing.assert_close(raised, 10.0 + left / (s1 + s2) @ right)


def test_lines_scales_with_depth():
    base = {"embed": torch.zeros(1), **{f"layers.{i}.w": torch.zeros(1) for i in range(3)}}
    models = [{n: torch.full((1,), v) for n in base} for v in (1.0, 3.0)]
    # Σ w τ = 2 · 1 + 0.5 · 3 = 3.5; the factors are 0.2, 0.2, 0.5 and 0.8.
    options = {"weights": [2.0, 0.5], "alpha": 0.2, "beta": 0.6}
    merged = merge_state_dicts("lines", models, base, **options)
    found = [float(merged[n]) for n in base]
    assert found == pytest.approx([3.5 * f for f in (0.2, 0.2, 0.5, 0.8)])
    default = merge_state_dicts("lines", models, base, beta=0.0)  # α = 1 / T: the mean
    assert [float(t) for t in default.values()] == pytest.approx([2.0] * 4)
    # The same factors on another method.
    scaled = merge_state_dicts("ties", models, base, density=1.0, lines=(0.2, 0.6))
    plain = merge_state_dicts("ties", models, base, density=1.0)
    for name, factor in zip(base, (0.2, 0.2, 0.5, 0.8), strict=True):
        torch.testing.assert_close(scaled[name], factor * plain[name])
    with pytest.raises(MethodError, match="lines scales task vectors, which average has none of"):
        merge_state_dicts("average", models, lines=(0.2, 0.6))


def test_pcb_by_hand():
    # Magnitudes (1, 2, 3) and (3, 2, 1); of three entries the largest is clipped to the second, so
    # a = (1, 2, 2) and (2, 2, 1), their norms (0, 1, 1) and (1, 1, 0); T = 2.
    base = torch.full((3,), 10.0)
    one, two = tensor(1.0, 2.0, 3.0), tensor(3.0, 2.0, -1.0)
    clipped = tensor(1.0, 2.0, 2.0), tensor(2.0, 2.0, -1.0)
    merged = pcb([base + one, base + two], base, density=0.67, scale=0.5)
    scores = [
        (2 * norm).exp() * (tau * (one + two)).tanh()
        for tau, norm in ((one, tensor(0.0, 1.0, 1.0)), (two, tensor(1.0, 1.0, 0.0)))
    ]
    # ⌊3 · 0.33⌋ = 0, so the smallest score is the limit: it is taken to 0, the largest to 1.
    shares = [(s - s.min()) / (s.max() - s.min()) for s in scores]
    expected = sum(s * a for s, a in zip(shares, clipped, strict=True)) / sum(shares)
    torch.testing.assert_close(merged, base + 0.5 * expected)
    # ⌊3 · 0.5⌋ = 1: the middle score is the limit, and only each task's best entry is left: the
    # second of the first task (tanh 8 > tanh 6), the first of the second.
    best = pcb([base + one, base + two], base, density=0.5, scale=0.5)
    torch.testing.assert_close(best, base + 0.5 * tensor(2.0, 2.0, 0.0))


def test_pcb_is_over_the_whole_model():
    generator = torch.Generator().manual_seed(0)
    draw = [
        {"a": torch.randn(30, generator=generator), "b": torch.randn(5, 8, generator=generator) * 9}
        for _ in range(4)
    ]
    merged = merge_state_dicts("pcb", draw[:3], draw[3])
    flat = [torch.cat([t.flatten() for t in d.values()]) for d in draw]
    expected = merge_tensors("pcb", flat[:3], flat[3])
    torch.testing.assert_close(torch.cat([t.flatten() for t in merged.values()]), expected)
    single = merge_state_dicts("pcb", draw[:3], draw[3], threshold_scope="tensor")
    torch.testing.assert_close(
        single["a"], merge_tensors("pcb", [d["a"] for d in draw[:3]], draw[3]["a"])
    )


def test_consensus_ties_by_hand():
    # Kept: 4 and 3 of the first, 5 and -4 of the second. With the weights 1 and 2 the sums are
    # (14, 0, -5, 0) - at entry 2 the second wins: 2 · -4 = -8 against 3.
    base = torch.full((4,), 10.0)
    models = [base + tensor(4.0, 1.0, 3.0, 0.5), base + tensor(5.0, 1.0, -4.0, 0.5)]
    ties_sum = tensor(14.0, 0.0, -8.0, 0.0)
    # |τ_t| ≥ 0.4 |τ - τ_t|: entry 0: 4 ≥ 4 and 5 ≥ 3.6; entry 2: 3 < 4.4, so one task only.
    options = {"weights": [1.0, 2.0], "density": 0.5, "threshold": 0.4, "scale": 0.5}
    merged = consensus_ties(models, base, **options)
    torch.testing.assert_close(merged, base + 0.5 * tensor(14.0, 0.0, 0.0, 0.0))
    anyone = consensus_ties(models, base, **{**options, "consensus": 1})
    torch.testing.assert_close(anyone, base + 0.5 * ties_sum)
