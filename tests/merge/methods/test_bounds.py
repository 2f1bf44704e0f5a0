"""Methods that keep numbers within bounds, or choose among them."""

import pytest
import torch

from merge.methods.clamp import Clamp
from merge.methods.maximum import Maximum
from merge.methods.nearswap import Nearswap
from tests.merge.memory import apply, same_bits
from tests.merge.methods.tensors import random


def test_nearswap_moves_no_further_than_it_may_and_takes_what_it_reaches():
    a, b = random(6, 50, inputs=2)
    t = 0.8e-3
    result = apply(Nearswap(t=t), a, b)
    near = (a - b).abs() < t - 1e-9
    assert 0 < near.float().mean() < 1
    assert same_bits(result[near], b[near])
    torch.testing.assert_close(result[~near], (a + (b - a).sign() * t)[~near])


def test_nearswap_has_no_epsilon():
    a, b = torch.tensor([1e-8, 1e-8]), torch.tensor([3e-8, 1.0])
    assert apply(Nearswap(t=1e-8), a, b).tolist() == pytest.approx([2e-8, 2e-8])


def test_nearswap_moves_by_0_or_more():
    with pytest.raises(ValueError, match=r"^t must be 0 or more, got -1"):
        Nearswap(t=-1)
    assert Nearswap(t=7)


@pytest.mark.parametrize("inputs", [2, 3, 6])
def test_maximum_is_the_largest_by_magnitude_or_by_value(inputs):
    tensors = random(6, 50, inputs=inputs)
    stacked = torch.stack(tensors)
    largest = stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]
    assert same_bits(apply(Maximum(), *tensors), largest)
    assert same_bits(apply(Maximum(by="value"), *tensors), stacked.amax(0))


def test_of_opposite_numbers_the_positive_one_is_larger():
    a, b = torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])
    assert apply(Maximum(), a, b).tolist() == apply(Maximum(), b, a).tolist() == [1, 1]


def bounded(a, *bounds, stiffness):
    """The formula, number by number."""
    numbers = [sorted(column) for column in zip(*(bound.tolist() for bound in bounds), strict=True)]
    result = []
    for x, column in zip(a.tolist(), numbers, strict=True):
        mean = sum(column) / len(column)
        low, high = column[0], column[-1]
        below = max(number for number in column if number <= mean)
        above = min(number for number in column if number >= mean)
        low, high = low + stiffness * (below - low), high + stiffness * (above - high)
        result.append(min(max(x, low), high))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("stiffness", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bounds", [2, 3, 5])
def test_clamp_is_its_formula(stiffness, bounds):
    a, *others = random(500, inputs=bounds + 1, dtype=torch.float64)
    result = apply(Clamp(stiffness=stiffness), a, *others, dtype=torch.float64)
    torch.testing.assert_close(result, bounded(a, *others, stiffness=stiffness), rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize("stiffness", [0.0, 0.5, 1.0])
def test_where_all_bounds_agree_the_result_is_theirs(stiffness):
    a, bound = random(6, 50, inputs=2)
    assert torch.equal(apply(Clamp(stiffness=stiffness), a, bound, bound, bound), bound)


def test_what_lies_within_the_bounds_is_not_touched():
    a, b, c = random(6, 50)
    between = torch.lerp(b, c, 0.5)
    assert same_bits(apply(Clamp(), between, b, c), between)
    assert torch.equal(apply(Clamp(), a, a, c), a)


def test_mergekit_agrees_on_nearswap():
    mergekit = pytest.importorskip("mergekit.merge_methods")
    a, b = random(6, 50, inputs=2)
    peer = mergekit.merge_tensors([a, b], "nearswap", parameters={"t": 0.8e-3}, base_index=0)
    torch.testing.assert_close(apply(Nearswap(t=0.8e-3), a, b), peer, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("stiffness", [0.0, 0.3, 1.0])
def test_sd_mecha_agrees_on_clamp(stiffness):
    limiting = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.limiting")
    tensors = random(6, 50, inputs=5, dtype=torch.float64)
    peer = limiting.clamp.__wrapped__(*tensors, stiffness=stiffness)
    result = apply(Clamp(stiffness=stiffness), *tensors, dtype=torch.float64)
    torch.testing.assert_close(result, peer, rtol=1e-12, atol=1e-17)
