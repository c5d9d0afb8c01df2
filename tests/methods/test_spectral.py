"""Methods on singular values: examples that can be worked out by hand, and direct restatements."""

import pytest
import torch

from omnimerge.errors import MethodError
from omnimerge.methods import aswudi, iso_c, iso_cts, optmerge, swudi, tsv, wudi


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def low_rank(count, m, n, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator) / rank
        for _ in range(count)
    ]


def test_iso_c_by_hand():
    # The task vectors sum to diag(6, 2): the mean singular value is 4, the directions stay.
    base = torch.full((2, 2), 10.0)
    models = [
        base + torch.diag(torch.tensor([5.0, 0.0])),
        base + torch.diag(torch.tensor([1.0, 2.0])),
    ]
    expected = base + 0.5 * torch.diag(torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(iso_c(models, base, scale=0.5), expected)


def test_tsv_by_hand():
    # Each task keeps one direction, and they are orthogonal already: e1 with 5, e2 with 3; what the
    # first task has beside it (1 along e2) is dropped.
    base = torch.full((2, 2), 10.0)
    models = [
        base + torch.diag(torch.tensor([5.0, 1.0])),
        base + torch.diag(torch.tensor([0.0, 3.0])),
    ]
    expected = base + 2.0 * torch.diag(torch.tensor([5.0, 3.0]))
    torch.testing.assert_close(tsv(models, base, scale=2.0), expected)


def test_tsv_needs_a_direction_for_every_model():
    base = torch.zeros(2, 9)
    with pytest.raises(MethodError, match="3 models are more than the rank"):
        tsv([base + i for i in range(3)], base)


def test_iso_cts_with_everything_common_is_iso_c():
    base, *models = (draw(6, 9, seed=i, dtype=torch.float32) for i in range(4))
    expected = iso_c(models, base, scale=0.7)
    torch.testing.assert_close(iso_cts(models, base, common_share=1.0, scale=0.7), expected)


def test_iso_cts_has_a_flat_spectrum():
    base, *models = (draw(9, 6, seed=i, dtype=torch.float32) for i in range(4))
    merged = iso_cts(models, base, common_share=0.5)
    values = torch.linalg.svdvals(merged - base)
    torch.testing.assert_close(values, values.mean().expand(6))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)], ids=str)
def test_optmerge_lora_equals_the_published_loop(shape):
    base = torch.zeros(shape)
    models = low_rank(3, *shape, rank=2)
    merged = optmerge(models, base, variant="lora", learning_rate=0.01, momentum=0.8, scale=0.5)

    tau = torch.stack(models).double()
    kept = min(shape) // 3
    u, s, vt = torch.linalg.svd(tau, full_matrices=False)
    low = (u[:, :, :kept] * s[:, None, :kept]) @ vt[:, :kept]
    rows = s[:, :kept, None] * vt[:, :kept]
    norms = tau.flatten(1).square().sum(1)[:, None, None]
    x = tau.mean(0).clone().requires_grad_()
    optimiser = torch.optim.SGD([x], lr=0.01, momentum=0.8)
    for _ in range(300):
        optimiser.zero_grad()
        ((((x - low) @ rows.transpose(1, 2)) ** 2) / norms).sum().backward()
        optimiser.step()
    expected = 0.5 * x.detach()
    assert (merged.double() - expected).norm() <= 1e-6 * expected.norm()
    assert (expected - 0.5 * tau.mean(0)).norm() > 1e-2 * expected.norm()  # the loop did move


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)], ids=str)
def test_wudi_equals_the_published_loop(shape):
    base = draw(*shape, seed=9, dtype=torch.float32)
    models = [base + 0.1 * draw(*shape, seed=i, dtype=torch.float32) for i in range(3)]
    merged = wudi(models, base, iterations=50, learning_rate=1e-3, scale=0.5)

    tau = torch.stack([m - base for m in models])
    norms = tau.flatten(1).square().sum(1)[:, None, None]
    x = tau.sum(0).clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=1e-3)
    for _ in range(50):
        optimiser.zero_grad()
        ((((x - tau) @ tau.transpose(1, 2)) ** 2) / norms).sum().backward()
        optimiser.step()
    torch.testing.assert_close(merged, base + 0.5 * x.detach(), rtol=1e-4, atol=1e-5)


def test_optmerge_chooses_the_variant_by_the_rank():
    base = torch.zeros(12, 12)
    low = low_rank(2, 12, 12, rank=3)
    full = [draw(12, 12, seed=i, dtype=torch.float32) for i in range(2)]
    assert torch.equal(optmerge(low, base), optmerge(low, base, variant="lora"))
    assert torch.equal(optmerge(full, base), optmerge(full, base, variant="full"))
    assert not torch.equal(optmerge(low, base), optmerge(low, base, variant="full"))


@pytest.mark.parametrize("method", [iso_c, iso_cts, tsv, wudi, optmerge, swudi, aswudi])
def test_other_tensors_than_matrices_are_averaged(method):
    base = torch.tensor([1.0, 2.0])
    models = [torch.tensor([3.0, 2.0]), torch.tensor([2.0, 6.0])]
    # mean task vector [1.5, 2], half of it
    torch.testing.assert_close(method(models, base, scale=0.5), torch.tensor([1.75, 3.0]))


def test_swudi_by_hand():
    # Task vectors diag(2, 0) and diag(0, 1): C = I, D = diag(2, 1), so every λ is 1. From the mean
    # diag(1, 0.5) the flow goes the share h = 1 - e^-t of the way to D.
    base = torch.full((2, 2), 10.0)
    models = [base + torch.diag(torch.tensor(d)) for d in ([2.0, 0.0], [0.0, 1.0])]
    h = 1 - torch.tensor(-0.7).exp()
    expected = base + 0.5 * torch.diag(torch.tensor([1.0, 0.5]) * (1 + h))
    merged = swudi(models, base, time=0.7, rank_ratio=None, init="mean", scale=0.5)
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)], ids=str)
def test_aswudi_with_every_direction_minimises_the_loss(shape):
    base = torch.zeros(shape)
    models = [draw(*shape, seed=i, dtype=torch.float32) for i in range(3)]
    merged = aswudi(models, base, rank_rule="none")

    def loss(x):
        return sum(float(((x - t) @ t.T).square().sum() / t.square().sum()) for t in models)

    for seed in range(10):
        assert loss(merged) <= loss(
            merged + 0.01 * draw(*shape, seed=90 + seed, dtype=torch.float32)
        )


def test_long_times_lead_to_the_minimum():
    base = torch.zeros(6, 4)
    models = [draw(6, 4, seed=i, dtype=torch.float32) for i in range(3)]
    far = swudi(models, base, time=1e6, rank_ratio=None)
    torch.testing.assert_close(far, aswudi(models, base, rank_rule="none"), rtol=1e-3, atol=1e-4)
