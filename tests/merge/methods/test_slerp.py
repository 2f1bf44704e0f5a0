import math

import pytest
import torch

from merge.methods.slerp import Slerp
from tests.merge.memory import apply, same_bits
from tests.merge.spheres import NUMBERS, at_angle, relative, tensors

ANGLES = (1e-6, 1e-4, 1e-2, 1.0, 3.0, math.pi - 1e-3)
T = (0.25, 0.5, 0.9)


def on_circle(theta, t):
    """The point at t of the way from a to b, by the plane that they were made in."""
    a, b = at_angle(math.pi / 2)
    angle = torch.tensor(theta * t, dtype=torch.float64)
    return a * angle.cos() + b * angle.sin()


@pytest.mark.parametrize("theta", ANGLES)
@pytest.mark.parametrize("t", [*T, -0.5, 1.5])
@pytest.mark.parametrize("lengths", ["between", "free"])
def test_it_goes_along_the_circle(theta, t, lengths):
    a, b = at_angle(theta)
    result = apply(Slerp(t=t, lengths=lengths), a, b, dtype=torch.float64)
    assert relative(result, on_circle(theta, t)) < 1e-15 + 1e-15 / (math.pi - theta) ** 2


@pytest.mark.parametrize("theta", [1e-4, 1e-3, 1e-2])
def test_at_small_angles_it_is_still_the_arc_and_not_the_chord(theta):
    a, b = at_angle(theta)
    chord = torch.lerp(a, b, 0.5)
    result = apply(Slerp(t=0.5), a, b, dtype=torch.float64)
    height = (on_circle(theta, 0.5) - chord).norm()
    assert height.item() == pytest.approx(theta**2 / 8, rel=1e-3)
    assert (result - on_circle(theta, 0.5)).norm() < 1e-2 * height


@pytest.mark.parametrize("theta", [1e-6, 1e-4, 1e-2])
def test_in_float32_the_last_rounding_is_nearly_all_the_error(theta):
    a, b = (tensor.float() for tensor in at_angle(theta))
    exact = apply(Slerp(t=0.3), a, b, dtype=torch.float64)
    result = apply(Slerp(t=0.3), a, b)
    rounding = (exact.float().double() - exact).norm()
    assert (result.double() - exact).norm() < 2 * rounding


def test_lengths_are_between_those_of_the_inputs_or_free():
    a, b = at_angle(math.pi / 2)
    between = apply(Slerp(t=0.5), a, 10 * b, dtype=torch.float64)
    free = apply(Slerp(t=0.5, lengths="free"), a, 10 * b, dtype=torch.float64)
    assert relative(between, 5.5 * (a + b) / math.sqrt(2)) < 1e-14
    assert relative(free, (a + 10 * b) / math.sqrt(2)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", ["between", "free"])
def test_half_precision_inputs_are_taken_for_what_they_are(dtype, lengths):
    a, b = tensors(50, 60, count=2, dtype=dtype)
    b = (a.double() + 0.1 * b.double()).to(dtype)
    x, y = a.double(), b.double()
    p, q = x.norm(), y.norm()
    theta = torch.arccos((x * y).sum() / (p * q))
    ways = torch.sin(0.7 * theta) / torch.sin(theta), torch.sin(0.3 * theta) / torch.sin(theta)
    expected = ways[0] * x + ways[1] * y
    if lengths == "between":
        expected = (ways[0] * x / p + ways[1] * y / q) * (0.7 * p + 0.3 * q)
    assert relative(apply(Slerp(t=0.3, lengths=lengths), a, b), expected) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (8, 4, 1, 1), (0, 3)])
def test_equal_inputs_are_left_bit_for_bit(shape, dtype):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert same_bits(apply(Slerp(t=0.3), a, a.clone(), dtype=dtype), a)


@pytest.mark.parametrize("lengths", ["between", "free"])
def test_without_an_arc_it_is_a_line(lengths):
    method = Slerp(t=0.25, lengths=lengths)
    a, b = at_angle(1.0)
    zero = torch.zeros(NUMBERS)
    assert relative(apply(method, zero, b), 0.25 * b) < 1e-7
    assert relative(apply(method, a, zero), 0.75 * a) < 1e-7
    assert not apply(method, zero, zero).any()
    assert relative(apply(method, a, -4 * a), -0.25 * a) < 1e-6
    assert apply(method, torch.tensor(2.0), torch.tensor(-2.0)).item() == 1.0
    assert apply(method, torch.tensor(2.0), torch.tensor(4.0)).item() == 2.5


def test_parallel_inputs_of_unlike_lengths_are_lerped():
    a, _ = at_angle(1.0)
    assert relative(apply(Slerp(t=0.25), a, 3 * a, dtype=torch.float64), 1.5 * a) < 1e-14


@pytest.mark.parametrize("theta", ANGLES[:-1])
def test_the_way_back_is_the_same(theta):
    a, b = at_angle(theta)
    there, back = apply(Slerp(t=0.3), a, 2 * b), apply(Slerp(t=0.7), 2 * b, a)
    assert relative(there, back) < 1e-6


def test_zero_and_one_are_the_inputs():
    assert (Slerp(t=0.0).unchanged(), Slerp(t=1.0).unchanged(), Slerp(t=0.5).unchanged()) == (0, 1, None)


def test_runs_do_not_matter():
    a, b = tensors(700, count=2, dtype=torch.float32)
    method = Slerp(t=0.3)
    assert same_bits(apply(method, a, b), apply(method, a, b, runs=[1, 0, 299, 400]))


def test_mergekit_agrees_where_it_takes_the_arc():
    mergekit = pytest.importorskip("mergekit.merge_methods")
    a, b = tensors(400, count=2)
    peer = mergekit.merge_tensors([a, 2 * b], "slerp", parameters={"t": 0.3}, base_index=0)
    assert relative(apply(Slerp(t=0.3, lengths="free"), a, 2 * b, dtype=torch.float64), peer) < 1e-12


def test_mergekit_takes_the_chord_below_two_degrees():
    mergekit = pytest.importorskip("mergekit.merge_methods")
    a, b = at_angle(0.03)
    peer = mergekit.merge_tensors([a, b], "slerp", parameters={"t": 0.5}, base_index=0)
    assert relative(peer, (a + b) / 2) < 1e-12
    assert relative(apply(Slerp(t=0.5, lengths="free"), a, b, dtype=torch.float64), on_circle(0.03, 0.5)) < 1e-14


def test_sd_mecha_agrees_at_wide_angles():
    module = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.linear")
    a, b = tensors(400, count=2)
    peer = module.slerp.__wrapped__(a, 2 * b, torch.tensor(0.3, dtype=torch.float64))
    assert relative(apply(Slerp(t=0.3), a, 2 * b, dtype=torch.float64), peer) < 1e-12
