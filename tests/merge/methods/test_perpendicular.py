import pytest
import torch

from merge.methods.perpendicular import Perpendicular
from tests.merge.memory import apply, same_bits
from tests.merge.spheres import at_angle, frame, relative, tensors


@pytest.mark.parametrize("theta", [1e-6, 1e-4, 1e-2, 1.0, 3.0])
def test_it_is_what_is_left_of_b_across_a(theta):
    a, b = at_angle(theta)
    across = frame(2)[1] * torch.tensor(theta, dtype=torch.float64).sin()
    assert relative(apply(Perpendicular(), 3 * a, b, dtype=torch.float64), across) < 1e-14 / theta + 1e-14


@pytest.mark.parametrize("theta", [1e-3, 1e-2, 1.0])
def test_the_result_is_perpendicular_to_a(theta):
    a, b = (tensor.half().double() for tensor in at_angle(theta))
    result = apply(Perpendicular(), a, b).double()
    assert abs(result @ a) / (result.norm() * a.norm()) < 1e-6


def test_a_zero_a_takes_nothing_away():
    a, b = tensors(20, 30, count=2, dtype=torch.float32)
    assert same_bits(apply(Perpendicular(), torch.zeros_like(a), b), b)
    assert not apply(Perpendicular(), a, torch.zeros_like(a)).any()


@pytest.mark.parametrize("shape", [(), (7,), (8, 4, 1, 1), (0, 3)])
def test_of_what_points_along_a_nothing_is_left(shape):
    a = tensors(*shape, count=1)[0]
    assert not apply(Perpendicular(), a, a.clone()).any()
    assert not apply(Perpendicular(), a, -2 * a, dtype=torch.float64).any()


def test_runs_do_not_matter():
    a, b = tensors(700, count=2, dtype=torch.float32)
    assert same_bits(apply(Perpendicular(), a, b), apply(Perpendicular(), a, b, runs=[1, 0, 299, 400]))


def test_sd_mecha_agrees():
    module = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.linear")
    a, b = tensors(20, 30, count=2)
    peer = module.perpendicular_component.__wrapped__(a, b)
    assert relative(apply(Perpendicular(), a, b, dtype=torch.float64), peer) < 1e-12
