"""The common toolkits' methods against numbers worked out by hand."""

import math

import pytest
import torch

from omnimerge.methods import (
    breadcrumbs,
    breadcrumbs_ties,
    karcher,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    sce,
    slerp,
)


def tensor(*values):
    return torch.tensor(values)


def test_slerp_goes_along_the_circle():
    # From (1, 0) to (0, 1) a third of the way: the angle is 30 degrees.
    merged = slerp([tensor(0.0, 1.0)], tensor(1.0, 0.0), t=1 / 3)
    torch.testing.assert_close(merged, tensor(math.cos(math.pi / 6), math.sin(math.pi / 6)))


def test_slerp_of_parallel_tensors_is_straight():
    merged = slerp([tensor(3.0, 3.0)], tensor(1.0, 1.0), t=0.25)
    torch.testing.assert_close(merged, tensor(1.5, 1.5))


def test_nuslerp_weights_are_shares():
    merged = nuslerp([tensor(1.0, 0.0), tensor(0.0, 1.0)], weights=[2.0, 1.0])
    torch.testing.assert_close(merged, tensor(math.cos(math.pi / 6), math.sin(math.pi / 6)))


def test_nuslerp_of_close_tensors_is_still_the_arc():
    # 0.02 apart, a cosine of 0.9998: three quarters of the way is 0.015, at full length 2. The
    # straight line, which slerp takes there, is shorter by 7.5e-5.
    first, second = 2 * tensor(1.0, 0.0), 2 * tensor(math.cos(0.02), math.sin(0.02))
    merged = nuslerp([first, second], weights=[1.0, 3.0])
    expected = 2 * tensor(math.cos(0.015), math.sin(0.015))
    torch.testing.assert_close(merged, expected, atol=0, rtol=1e-6)
    line = slerp([second], first, t=0.75)
    torch.testing.assert_close(line, 0.25 * first + 0.75 * second)
    assert (line - expected).norm() > 5e-5


@pytest.mark.parametrize("factor", [3.0, -3.0])
def test_nuslerp_of_colinear_tensors_is_straight(factor):
    model = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    merged = nuslerp([model, factor * model], weights=[3.0, 1.0])
    torch.testing.assert_close(merged, (0.75 + 0.25 * factor) * model)


def test_karcher_of_two_directions_is_the_middle_of_the_arc_with_the_mean_norm():
    merged = karcher([tensor(2.0, 0.0), tensor(0.0, 4.0)])
    torch.testing.assert_close(merged, tensor(3.0, 3.0) / math.sqrt(2))


def test_karcher_minimises_the_squared_angles():
    models = [torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def cost(direction):
        return sum(
            float(torch.nn.functional.cosine_similarity(m, direction, dim=0).acos()) ** 2
            for m in models
        )

    mean = karcher(models, iterations=100, tolerance=1e-9)
    generator = torch.Generator().manual_seed(9)
    for _ in range(20):
        assert cost(mean) <= cost(mean + 0.01 * torch.randn(5, generator=generator)) + 1e-6


def test_multislerp_with_one_weight_is_that_model():
    merged = multislerp([tensor(2.0, 0.0), tensor(0.0, 4.0)], weights=[0.0, 1.0])
    torch.testing.assert_close(merged, tensor(0.0, 4.0))


def test_model_stock_by_hand():
    # τ = (2, 0) and (1, 1): their cosine is 1/√2, t = 2c / (1 + c), the mean is (1.5, 0.5).
    base = tensor(10.0, 10.0)
    merged = model_stock([tensor(12.0, 10.0), tensor(11.0, 11.0)], base)
    c = 1 / math.sqrt(2)
    torch.testing.assert_close(merged, base + 2 * c / (1 + c) * tensor(1.5, 0.5))


def test_model_stock_of_opposite_task_vectors_is_the_base():
    base = tensor(10.0, 10.0)
    merged = model_stock([base + tensor(1.0, 0.0), base - tensor(1.0, 0.0)], base)
    torch.testing.assert_close(merged, base)


def test_sce_by_hand():
    # τ = (3, 1, 1, 1) and (1, -2, 1, 1). The variance is largest at entry 1 (2.25), then 0 (1).
    # Energies over all four entries with the others at zero: (9 + 1)/4 and (1 + 4)/4, so 2/3, 1/3.
    # Entry 0: both agree, 2/3·3 + 1/3·1 = 7/3. Entry 1: the sum is -1, so only -2 is left.
    base = torch.zeros(4)
    models = [tensor(3.0, 1.0, 1.0, 1.0), tensor(1.0, -2.0, 1.0, 1.0)]
    merged = sce(models, base, select_top=0.5)
    torch.testing.assert_close(merged, tensor(7 / 3, -2.0, 0.0, 0.0))


CRUMBS = [tensor(9.0, 4.0, -3.0, 1.0), tensor(8.0, -5.0, -2.0, 1.0)]


def test_breadcrumbs_by_hand():
    # Of four entries the largest goes (γ 0.25), two are kept: τ̂ = (0, 4, -3, 0), (0, -5, -2, 0).
    base = torch.full((4,), 10.0)
    models = [base + tau for tau in CRUMBS]
    merged = breadcrumbs(models, base, weights=[2.0, 1.0], density=0.5, gamma=0.25, scale=0.5)
    torch.testing.assert_close(merged, base + 0.5 * tensor(0.0, 3.0, -8.0, 0.0))
    merged = breadcrumbs(models, base, weights=[2.0, 1.0], density=0.5, gamma=0.25, normalize=True)
    torch.testing.assert_close(merged, base + tensor(0.0, 1.0, -8 / 3, 0.0))


def test_breadcrumbs_ties_by_hand():
    # As above, then signs: entry 1 elects + (8 - 5), so only 2·4 is left; entry 2 agrees.
    base = torch.full((4,), 10.0)
    models = [base + tau for tau in CRUMBS]
    options = {"weights": [2.0, 1.0], "density": 0.5, "gamma": 0.25}
    merged = breadcrumbs_ties(models, base, scale=0.5, **options)
    torch.testing.assert_close(merged, base + 0.5 * tensor(0.0, 8.0, -8.0, 0.0))
    merged = breadcrumbs_ties(models, base, normalize=True, **options)
    torch.testing.assert_close(merged, base + tensor(0.0, 4.0, -8 / 3, 0.0))


def test_nearswap_takes_over_what_is_near():
    merged = nearswap([tensor(1.05, 3.0, -1.0)], tensor(1.0, 2.0, 1.0), t=0.1)
    torch.testing.assert_close(merged, tensor(1.05, 2.1, 0.9))


def test_passthrough():
    assert torch.equal(passthrough([tensor(1.0, -2.0)], scale=0.5), tensor(0.5, -1.0))
