import math

import pytest
import torch

from merge.methods.karcher import Karcher
from merge.methods.slerp import Slerp
from tests.merge.memory import apply, same_bits
from tests.merge.spheres import at_angle, frame, relative, tensors


@pytest.mark.parametrize("theta", [1e-6, 1e-4, 1e-2, 1.0, 3.0])
@pytest.mark.parametrize("t", [0.1, 0.5])
def test_of_two_it_is_slerp(theta, t):
    a, b = at_angle(theta)
    expected = apply(Slerp(t=t), a, 3 * b, dtype=torch.float64)
    assert relative(apply(Karcher(weights=(1 - t, t)), a, 3 * b, dtype=torch.float64), expected) < 1e-12


@pytest.mark.parametrize("inputs", [3, 6])
@pytest.mark.parametrize("spread", [1e-3, 0.5, 3.0])
def test_the_arcs_to_the_inputs_cancel_there(inputs, spread):
    center, *others = tensors(400, count=inputs + 1)
    given = [center + spread * other for other in others]
    weights = torch.arange(1.0, inputs + 1, dtype=torch.float64)
    result = apply(Karcher(weights=tuple(weights.tolist())), *given, dtype=torch.float64)
    u = result / result.norm()
    arcs = torch.zeros_like(u)
    for tensor, weight in zip(given, weights, strict=True):
        side = tensor / tensor.norm() - (tensor @ u / tensor.norm()) * u
        theta = torch.atan2(side.norm(), tensor @ u / tensor.norm())
        arcs += weight * theta * side / side.norm()
    assert arcs.norm() < 1e-13 * weights.sum()
    lengths = torch.stack([tensor.norm() for tensor in given])
    assert result.norm().item() == pytest.approx((weights @ lengths / weights.sum()).item(), rel=1e-14)


def test_on_a_circle_it_is_the_mean_angle_which_nlerp_is_not():
    x, y = frame(2)
    angles = torch.tensor([0.0, 0.2, 1.9], dtype=torch.float64)
    given = [x * angle.cos() + y * angle.sin() for angle in angles]
    expected = x * angles.mean().cos() + y * angles.mean().sin()
    assert relative(apply(Karcher(), *given, dtype=torch.float64), expected) < 1e-13


def test_a_zero_input_counts_by_its_length_alone():
    a, b = frame(2)
    result = apply(Karcher(), a, b, torch.zeros_like(a), dtype=torch.float64)
    assert relative(result, (a + b) / math.sqrt(2) * 2 / 3) < 1e-14
    assert not apply(Karcher(), torch.zeros(5), torch.zeros(5)).any()


def test_where_there_is_no_such_mean_it_is_that_of_the_tensors():
    a = frame(1)[0]
    assert not apply(Karcher(), a, -a).any()
    assert relative(apply(Karcher(), a, 2 * a, -a, dtype=torch.float64), 2 * a / 3) < 1e-14
    assert apply(Karcher(), *(torch.tensor(number) for number in (-1.0, 3.0, 4.0))).item() == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (9,), (8, 4, 1, 1), (0, 3)])
def test_equal_inputs_are_left_bit_for_bit(dtype, shape):
    a = tensors(*shape, count=1, dtype=dtype)[0]
    assert same_bits(apply(Karcher(weights=(1.0, 2.0, 0.3)), a, a.clone(), a.clone(), dtype=dtype), a)


def test_the_order_does_not_matter_but_for_rounding():
    a, b, c = tensors(500, count=3)
    there = apply(Karcher(weights=(1.0, 2.0, 3.0)), a, b, c, dtype=torch.float64)
    assert relative(apply(Karcher(weights=(3.0, 1.0, 2.0)), c, a, b, dtype=torch.float64), there) < 1e-13


def test_runs_do_not_matter():
    given = tensors(700, count=3, dtype=torch.float32)
    assert same_bits(apply(Karcher(), *given), apply(Karcher(), *given, runs=[1, 0, 299, 400]))


def test_the_only_one_with_a_weight_is_taken_as_it_is():
    assert Karcher(weights=(0.0, 2.0, 0.0)).unchanged() == 1


def test_mergekit_agrees_to_its_tolerance():
    mergekit = pytest.importorskip("mergekit.merge_methods")
    given = tensors(400, count=4)
    peer = mergekit.merge_tensors(given, "karcher")
    assert relative(apply(Karcher(), *given, dtype=torch.float64), peer) < 1e-5
