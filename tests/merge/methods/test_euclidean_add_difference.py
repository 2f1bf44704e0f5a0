import pytest
import torch

from merge.methods.euclidean_add_difference import EuclideanAddDifference
from tests.merge.memory import apply
from tests.merge.methods.tensors import random


def formula(a, b, c, alpha):
    """meh's, on models."""
    a_unit = torch.nan_to_num((a - c) / (a - c).norm())
    b_unit = torch.nan_to_num((b - c) / (b - c).norm())
    mean = (1 - alpha) * a + alpha * b - c
    distance = torch.copysign(((1 - alpha) * a_unit**2 + alpha * b_unit**2).sqrt(), mean)
    return distance / distance.norm() * mean.norm()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(6, 50), (300_000,)])
def test_it_is_the_formula(alpha, shape):
    a, b, c = random(*shape, dtype=torch.float64)
    result = apply(EuclideanAddDifference(alpha=alpha), a - c, b - c, dtype=torch.float64)
    torch.testing.assert_close(result, formula(a, b, c, alpha), rtol=1e-9, atol=1e-17)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
def test_it_is_as_long_as_the_weighted_sum(alpha):
    a, b = (tensor.half() for tensor in random(30, 50, inputs=2))
    b[:7] = -a[:7]  # at alpha = 1/2 nothing is left there
    expected = torch.lerp(a.double(), b.double(), alpha).norm().item()
    result = apply(EuclideanAddDifference(alpha=alpha), a, b)
    assert result.double().norm().item() == pytest.approx(expected, rel=1e-6)
    assert alpha != 0.5 or not result[:7].any()


def test_a_zero_difference_counts_nothing():
    a, zero = random(30, 50, inputs=1)[0], torch.zeros(30, 50)
    torch.testing.assert_close(apply(EuclideanAddDifference(alpha=0.25), a, zero), 0.75 * a)
    torch.testing.assert_close(apply(EuclideanAddDifference(alpha=0.25), zero, a), 0.25 * a)


def test_opposite_differences_give_nothing():
    a = random(30, 50, inputs=1)[0]
    assert not apply(EuclideanAddDifference(), a, -a).any()


def test_what_is_tiny_is_not_lost_in_squares():
    a, b = random(30, 50, inputs=2)
    large = apply(EuclideanAddDifference(), a, b)
    small = apply(EuclideanAddDifference(), a * 1e-30, b * 1e-30) * 1e30
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-8)
