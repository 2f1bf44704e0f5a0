"""Methods that are sums of a few inputs, each by its formula in float64."""

import pytest
import torch

from merge.methods.add import Add
from merge.methods.add_difference import AddDifference
from merge.methods.lerp import Lerp
from merge.methods.passthrough import Passthrough
from merge.methods.scale import Scale
from merge.methods.subtract import Subtract
from merge.methods.sum_twice import SumTwice
from merge.methods.train_difference import TrainDifference
from merge.methods.triple_sum import TripleSum
from merge.methods.weighted_subtraction import WeightedSubtraction
from tests.merge.memory import apply, same_bits
from tests.merge.methods.tensors import random

NUMBERS = (-0.7, 0.2, 0.5, 1.0, 1.3)


def exactly(method, *tensors):
    return apply(method, *tensors, dtype=torch.float64)


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-17)


@pytest.fixture
def models():
    return random(6, 50, dtype=torch.float64)


@pytest.mark.parametrize("weight", NUMBERS)
def test_sums_of_two_are_their_formulas(weight, models):
    a, b, c = models
    close(exactly(Add(weight=weight), a, b), a + weight * b)
    close(exactly(Subtract(), a, b), a - b)
    close(exactly(Scale(factor=weight), a), weight * a)
    close(exactly(AddDifference(weight=weight), a, b, c), a + weight * (b - c))


@pytest.mark.parametrize("alpha", NUMBERS)
@pytest.mark.parametrize("beta", NUMBERS)
def test_sums_of_three_are_their_formulas(alpha, beta, models):
    a, b, c = models
    twice = (1 - beta) * ((1 - alpha) * a + alpha * b) + beta * c
    close(exactly(SumTwice(alpha=alpha, beta=beta), a, b, c), twice)
    close(exactly(TripleSum(alpha=alpha, beta=beta), a, b, c), (1 - alpha - beta) * a + alpha * b + beta * c)


def test_add_difference_is_add_of_subtract(models):
    a, b, c = (model.float() for model in models)
    assert same_bits(apply(AddDifference(weight=0.7), a, b, c), apply(Add(weight=0.7), a, apply(Subtract(), b, c)))


def test_a_difference_added_to_its_base_is_the_model_again():
    base, model = (tensor.half() for tensor in random(6, 50, inputs=2))
    assert torch.equal(apply(Add(), base, apply(Subtract(), model, base)).half(), model)


@pytest.mark.parametrize("factor", [0.0, -0.0])
def test_scaled_by_zero_everything_is_zero(factor):
    assert same_bits(apply(Scale(factor=factor), torch.tensor([torch.inf, torch.nan, -1.0])), torch.zeros(3))


def test_passthrough_is_the_input_to_the_bit():
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-45])
    assert same_bits(apply(Passthrough(), odd), odd)


@pytest.mark.parametrize("t", [-2.0, 0.25, 0.9, 3.0])
def test_weighted_subtraction_undoes_lerp(t, models):
    a, b, _ = models
    close(exactly(WeightedSubtraction(t=t), exactly(Lerp(t=t), a, b), b), a)
    close(exactly(WeightedSubtraction(t=t), a, b), (a - t * b) / (1 - t))


def test_weighted_subtraction_of_everything_is_refused():
    with pytest.raises(ValueError, match=r"^t must not be 1"):
        WeightedSubtraction(t=1)


@pytest.mark.parametrize("weight", NUMBERS)
def test_train_difference_is_supermergers_formula(weight, models):
    a, b, c = models
    fraction = (b - a).abs() / ((b - c).abs() + (b - a).abs())
    close(exactly(TrainDifference(weight=weight), a, b, c), a + 1.8 * weight * (b - c) * fraction)


def test_train_difference_adds_nothing_to_what_is_there_already(models):
    a, b, c = models
    assert same_bits(exactly(TrainDifference(), b, b, c), b)
    assert same_bits(exactly(TrainDifference(), a, b, b), a)
    assert same_bits(exactly(TrainDifference(), a, a, a), a)
    far = exactly(TrainDifference(), a + 100, b, c) - (a + 100)
    torch.testing.assert_close(far, 1.8 * (b - c), rtol=1e-3, atol=1e-13)


def test_sd_mecha_agrees(models):
    linear = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.linear")
    a, b, c = models
    alpha = torch.tensor(0.7, dtype=torch.float64)
    added = linear.add_difference.__wrapped__({"w": a}, {"w": b - c}, alpha, key="w")
    close(exactly(AddDifference(weight=0.7), a, b, c), added)
    mask = linear.train_difference_mask.__wrapped__(a, b, c, alpha)
    close(exactly(TrainDifference(weight=0.7), a, b, c), a + mask * (b - c))
