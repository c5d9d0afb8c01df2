"""Each method against numbers worked out by hand, with unequal weights and scale other than 1."""

import pytest
import torch

from omnimerge.errors import MethodError
from omnimerge.methods import adamms, average, linear, merge_tensors, task_arithmetic


def tensor(*values):
    return torch.tensor(values)


def test_adamms():
    # 0.7 · [1, -2, 10] + 0.3 · [2, 8, 0] = [0.7 + 0.6, -1.4 + 2.4, 7 + 0]
    merged = adamms([tensor(1.0, -2.0, 10.0), tensor(2.0, 8.0, 0.0)], alpha=0.3)
    torch.testing.assert_close(merged, tensor(1.3, 1.0, 7.0))


def test_adamms_at_zero_keeps_the_sign_of_zero():
    merged = adamms([tensor(-0.0, 1.0), tensor(5.0, 5.0)], alpha=0.0)
    assert torch.equal(merged.view(torch.int32), tensor(-0.0, 1.0).view(torch.int32))


def test_adamms_at_one_is_the_donor():
    merged = adamms([tensor(1.0, 2.0), tensor(5.0, -7.5)], alpha=1.0)
    assert torch.equal(merged, tensor(5.0, -7.5))


def test_linear():
    models = [tensor(1.0, 2.0), tensor(3.0, -2.0), tensor(0.0, 4.0)]
    # weights 1, 2, 5: (1 + 6 + 0) / 8 and (2 - 4 + 20) / 8
    torch.testing.assert_close(linear(models, weights=[1, 2, 5]), tensor(0.875, 2.25))
    # the same without the division
    merged = linear(models, weights=[1, 2, 5], normalize=False)
    torch.testing.assert_close(merged, tensor(7.0, 18.0))


def test_linear_without_weights_is_the_average():
    models = [tensor(1.0, 2.0), tensor(3.0, -2.0)]
    torch.testing.assert_close(linear(models), tensor(2.0, 0.0))


def test_linear_refuses_weights_that_cancel():
    with pytest.raises(MethodError, match="sum to zero"):
        linear([tensor(1.0), tensor(2.0)], weights=[1, -1])
    with pytest.raises(MethodError, match="sum to zero"):  # but for rounding
        linear([tensor(1.0), tensor(2.0), tensor(3.0)], weights=[0.1, 0.2, -0.3])


def test_average():
    models = [tensor(1.0, 2.0), tensor(3.0, -2.0), tensor(2.0, 3.0)]
    torch.testing.assert_close(average(models), tensor(2.0, 1.0))


def test_task_arithmetic():
    base = tensor(10.0, 10.0)
    models = [tensor(12.0, 9.0), tensor(6.0, 10.0)]
    # τ = [2, -1], [-4, 0]; weighted 3·τ1 + 0.5·τ2 = [6 - 2, -3]; scale 0.5 -> [2, -1.5]
    merged = task_arithmetic(models, base, weights=[3.0, 0.5], scale=0.5)
    torch.testing.assert_close(merged, tensor(12.0, 8.5))


def test_low_precision_inputs_are_summed_in_float32():
    # In bfloat16, 256 + 1 is 256; the float32 average of 256 and 1 is 128.5.
    models = [tensor(256.0).bfloat16(), tensor(1.0).bfloat16()]
    assert average(models).item() == 128.5


def test_adamms_with_several_donors():
    """α = 0.5, weights 1 and 3: shares 0.5, 0.125 and 0.375."""
    models = [torch.tensor([v]) for v in (8.0, 16.0, -8.0)]
    merged = merge_tensors("adamms", models, alpha=0.5, weights=[1, 3])
    assert merged.tolist() == [4.0 + 2.0 - 3.0]
    assert merge_tensors("adamms", models, alpha=0.5).tolist() == [4.0 + 4.0 - 2.0]
    assert merge_tensors("adamms", models, alpha=0.0, weights=[1, 3]).tolist() == [8.0]
    with pytest.raises(MethodError, match="the weights sum to zero"):
        merge_tensors("adamms", models, alpha=0.5, weights=[1, -1])
