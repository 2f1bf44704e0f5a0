import math
from itertools import permutations

import pytest
import torch

from merge.methods.geometric_median import GeometricMedian
from tests.merge.memory import apply, same_bits
from tests.merge.spheres import frame, relative, tensors


@pytest.mark.parametrize("inputs", [3, 4, 7])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spread", [1e-6, 1.0])
def test_the_directions_to_the_inputs_cancel_there(inputs, weighted, spread):
    common, *noise = tensors(400, count=inputs + 1)
    given = [common + spread * (1 + index) * tensor for index, tensor in enumerate(noise)]
    weights = tuple(1 + 0.1 * index for index in range(inputs)) if weighted else ()
    result = apply(GeometricMedian(weights=weights), *given, dtype=torch.float64)
    sides = [tensor - result for tensor in given]
    pull = sum(weight * side / side.norm() for weight, side in zip(weights or [1.0] * inputs, sides, strict=True))
    assert pull.norm() < 1e-10 / spread**0.5


def test_of_a_triangle_it_is_the_point_that_sees_all_sides_alike():
    x, y = frame(2)
    corners = [0 * x, 4 * x, x + 3 * y]
    m = apply(GeometricMedian(), *corners, dtype=torch.float64)
    for one, two in ((0, 1), (1, 2), (2, 0)):
        p, q = corners[one] - m, corners[two] - m
        assert (p @ q / (p.norm() * q.norm())).item() == pytest.approx(-0.5, abs=1e-9)


def test_a_corner_wider_than_120_degrees_is_the_median_itself():
    x, y = frame(2)
    corner = tensors(3000, count=1)[0]
    angle = math.radians(121)
    given = [corner + x, corner, corner + math.cos(angle) * x + math.sin(angle) * y]
    assert same_bits(apply(GeometricMedian(), *given, dtype=torch.float64), corner)


def test_a_stray_moves_it_little_however_far_it_is():
    common, *noise = tensors(400, count=6)
    given = [common + 0.1 * tensor for tensor in noise]
    results = [apply(GeometricMedian(), *given, common + far * noise[0], dtype=torch.float64) for far in (1e2, 1e6)]
    assert relative(*results) < 1e-3
    assert (results[1] - common).norm() < 0.1 * common.norm()


def test_what_outweighs_the_rest_is_the_median():
    a, b, c = tensors(30, 40, count=3)
    assert same_bits(apply(GeometricMedian(weights=(1.0, 2.1, 1.0)), a, b, c, dtype=torch.float64), b)
    assert same_bits(apply(GeometricMedian(), a, b, a.clone(), dtype=torch.float64), a)


def test_of_two_it_is_the_middle():
    a, b = tensors(30, 40, count=2)
    assert relative(apply(GeometricMedian(), a, b, dtype=torch.float64), (a + b) / 2) < 1e-15


def test_a_square_has_its_centre_as_median():
    x, y = frame(2)
    assert apply(GeometricMedian(), x, y, -x, -y, dtype=torch.float64).norm() < 1e-13


def test_steps_that_meet_an_input_leave_it_again():
    x, y = frame(2)
    given = [0 * x, 2 * x + 0 * y, -x + y, -x - y]  # their mean is the first one
    weights = (0.1, 1.0, 1.0, 1.0)
    m = apply(GeometricMedian(weights=weights), *given, dtype=torch.float64)
    sides = [tensor - m for tensor in given]
    pull = sum(weight * side / side.norm() for weight, side in zip(weights, sides, strict=True) if side.norm() > 0)
    assert m.norm() > 1e-2
    assert pull.norm() < 1e-10


def test_the_order_does_not_matter_but_for_rounding():
    given = tensors(200, count=4)
    results = [apply(GeometricMedian(), *order, dtype=torch.float64) for order in permutations(given)]
    assert all(relative(result, results[0]) < 1e-12 for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (9,), (8, 4, 1, 1), (0, 3)])
def test_equal_inputs_are_left_bit_for_bit(dtype, shape):
    a = tensors(*shape, count=1, dtype=dtype)[0]
    assert same_bits(apply(GeometricMedian(weights=(1.0, 2.0, 0.3)), a, a.clone(), a.clone(), dtype=dtype), a)


def test_of_numbers_it_is_the_one_in_the_middle():
    numbers = [torch.tensor(number) for number in (1.0, 7.0, -3.0, 2.0, 100.0)]
    assert apply(GeometricMedian(), *numbers).item() == 2.0


def test_runs_do_not_matter():
    given = tensors(700, count=3, dtype=torch.float32)
    assert same_bits(apply(GeometricMedian(), *given), apply(GeometricMedian(), *given, runs=[1, 0, 299, 400]))


def test_sd_mecha_agrees_as_far_as_it_gets():
    module = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.ties")
    given = tensors(20, 30, count=4)
    peer = module.geometric_median.__wrapped__(*given)
    assert relative(apply(GeometricMedian(), *given, dtype=torch.float64), peer) < 1e-3
