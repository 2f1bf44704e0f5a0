import math

import pytest
import torch

from merge.methods.nlerp import Nlerp
from merge.methods.slerp import Slerp
from tests.merge.memory import apply, same_bits
from tests.merge.spheres import at_angle, frame, relative, tensors


def directly(inputs, shares):
    mean = sum(share * tensor / tensor.norm() for tensor, share in zip(inputs, shares, strict=True))
    return mean / mean.norm() * sum(share * tensor.norm() for tensor, share in zip(inputs, shares, strict=True))


@pytest.mark.parametrize("inputs", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_normalised_mean_of_directions_at_the_mean_length(inputs, dtype):
    given = [(index + 1) * tensor for index, tensor in enumerate(tensors(20, 30, count=inputs))]
    weights = tuple(float(index + 1) for index in range(inputs))
    expected = directly(given, [weight / sum(weights) for weight in weights])
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    assert relative(apply(Nlerp(weights=weights), *given, dtype=dtype), expected) < limit
    assert relative(apply(Nlerp(), *given, dtype=dtype), directly(given, [1 / inputs] * inputs)) < limit


@pytest.mark.parametrize("theta", [1e-6, 1e-4, 1e-2, 1.0, 3.0])
def test_halfway_between_two_it_is_slerp(theta):
    a, b = at_angle(theta)
    assert relative(apply(Nlerp(), a, b, dtype=torch.float64), apply(Slerp(), a, b, dtype=torch.float64)) < 1e-13


def test_a_zero_input_counts_by_its_length_alone():
    a, b = frame(2)
    result = apply(Nlerp(), a, b, torch.zeros_like(a), dtype=torch.float64)
    assert relative(result, (a + b) / math.sqrt(2) * 2 / 3) < 1e-14
    assert not apply(Nlerp(), torch.zeros(5), torch.zeros(5)).any()


def test_directions_that_cancel_give_the_mean_of_the_tensors():
    a, b = frame(2)
    assert not apply(Nlerp(), a, -a).any()
    assert relative(apply(Nlerp(), a, -2 * a, b, -b, dtype=torch.float64), -a / 4) < 1e-14
    assert apply(Nlerp(), torch.tensor(-1.0), torch.tensor(3.0)).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (9,), (8, 4, 1, 1), (0, 3)])
def test_equal_inputs_are_left_bit_for_bit(dtype, shape):
    a = tensors(*shape, count=1, dtype=dtype)[0]
    assert same_bits(apply(Nlerp(weights=(1.0, 2.0, 0.3)), a, a.clone(), a.clone(), dtype=dtype), a)


def test_the_order_does_not_matter_but_for_rounding():
    a, b, c = tensors(500, count=3)
    there = apply(Nlerp(weights=(1.0, 2.0, 3.0)), a, b, c, dtype=torch.float64)
    assert relative(apply(Nlerp(weights=(3.0, 1.0, 2.0)), c, a, b, dtype=torch.float64), there) < 1e-14


def test_runs_do_not_matter():
    given = tensors(700, count=3, dtype=torch.float32)
    assert same_bits(apply(Nlerp(), *given), apply(Nlerp(), *given, runs=[1, 0, 299, 400]))


def test_the_only_one_with_a_weight_is_taken_as_it_is():
    assert Nlerp(weights=(0.0, 2.0, 0.0)).unchanged() == 1
    assert Nlerp(weights=(1.0, 2.0, 0.0)).unchanged() is None


def test_multislerp_of_mergekit_is_this():
    mergekit = pytest.importorskip("mergekit.merge_methods")
    given = tensors(20, 30, count=3)
    peer = mergekit.merge_tensors(given, "multislerp", parameters={"weight": [1.0, 2.0, 3.0]})
    assert relative(apply(Nlerp(weights=(1.0, 2.0, 3.0)), *given, dtype=torch.float64), peer) < 1e-6
