import pytest
import torch

from merge.methods.geometric import Geometric
from merge.methods.multiply_difference import MultiplyDifference
from tests.merge.memory import apply
from tests.merge.methods.tensors import random


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_it_is_the_mean_of_the_logarithms_with_the_sign_of_both(t):
    a, b = random(6, 50, inputs=2, dtype=torch.float64)
    b = b.abs().copysign(a)
    expected = (a.abs() ** (1 - t) * b.abs() ** t).copysign(a)
    close(apply(Geometric(t=t), a, b, dtype=torch.float64), expected)


def test_there_is_none_of_opposite_signs_or_of_zero():
    a, b = torch.tensor([1.0, -1.0, 0.0, 0.0, -2.0]), torch.tensor([-4.0, 4.0, 3.0, 0.0, -8.0])
    assert apply(Geometric(), a, b).tolist() == [0, 0, 0, 0, -4]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_multiply_difference_is_mehs_formula(alpha, beta):
    a, b, c = random(6, 50, dtype=torch.float64)
    size = (a - c).abs() ** (1 - alpha) * (b - c).abs() ** alpha
    expected = torch.copysign(size, (1 - beta) * a + beta * b - c)
    close(apply(MultiplyDifference(alpha=alpha, beta=beta), a - c, b - c, dtype=torch.float64), expected)


def test_multiply_difference_has_no_sign_where_the_differences_balance():
    a, b = torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([-1.0, 1.0, 1.0, -1.0])
    assert apply(MultiplyDifference(), a, b).tolist() == pytest.approx([0, 0, 0, 2**0.5])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_difference_of_share_zero_does_not_count_even_where_it_is_zero(alpha):
    a, b = torch.tensor([0.0, 3.0]), torch.tensor([2.0, 0.0])
    result = apply(MultiplyDifference(alpha=alpha, beta=0.5), a, b)
    assert result.tolist() == ([2, 0] if alpha else [0, 3])


@pytest.mark.parametrize("kind", [Geometric, MultiplyDifference])
def test_a_share_is_from_0_to_1(kind):
    field = "t" if kind is Geometric else "alpha"
    with pytest.raises(ValueError, match=f"^{field} must be from 0 to 1, got 1.1"):
        kind(**{field: 1.1})


def test_sd_mecha_agrees_where_signs_do():
    linear = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.linear")
    a, b = random(6, 50, inputs=2, dtype=torch.float64)
    peer = linear.geometric_sum.__wrapped__(a, b, torch.tensor(0.3, dtype=torch.float64))
    ours = apply(Geometric(t=0.3), a, b, dtype=torch.float64)
    same = a.sign() == b.sign()
    close(ours[same], peer[same])
    mixed = peer[~same] / (a.abs() ** 0.7 * b.abs() ** 0.3)[~same]  # the complex mean of 1 and -1, or of -1 and 1
    assert {round(number, 6) for number in mixed.tolist()} == {0.587785, -0.587785}
