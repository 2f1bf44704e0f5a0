import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge.methods.lerp import Lerp
from tests.merge.memory import apply, same_bits
from tests.merge.methods.tensors import random


@pytest.mark.parametrize("t", [-1.5, 0.1, 0.5, 0.7, 2.0])
def test_it_is_the_sum_by_shares(t):
    a, b = random(6, 50, inputs=2, dtype=torch.float64)
    torch.testing.assert_close(apply(Lerp(t=t), a, b, dtype=torch.float64), (1 - t) * a + t * b, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_curves_are_those_of_the_diffusers_pipeline(t):
    a, b = random(6, 50, inputs=2, dtype=torch.float64)
    eased = {"smoothstep": t**2 * (3 - 2 * t), "inverse_smoothstep": 0.5 - math.sin(math.asin(1 - 2 * t) / 3)}
    for curve, share in eased.items():
        expected = a + (b - a) * share
        torch.testing.assert_close(
            apply(Lerp(t=t, curve=curve), a, b, dtype=torch.float64), expected, rtol=1e-12, atol=0
        )


@given(st.floats(0, 1))
def test_the_two_curves_undo_each_other(t):
    eased = Lerp(t=t, curve="smoothstep").share
    assert 0 <= eased <= 1
    assert Lerp(t=eased, curve="inverse_smoothstep").share == pytest.approx(t, abs=1e-7)  # flat ends lose digits


@pytest.mark.parametrize("curve", ["linear", "smoothstep", "inverse_smoothstep"])
@pytest.mark.parametrize("t", [0, 1])
def test_the_ends_of_every_curve_are_the_inputs_though_the_other_overflows(curve, t):
    a, b = torch.tensor([3e38, -0.0, 1.0]), torch.tensor([-3e38, torch.inf, 2.0])
    assert same_bits(apply(Lerp(t=t, curve=curve), a, b), (a, b)[t])


def test_half_precision_is_rounded_once():
    a, b = (tensor.half() for tensor in random(100_000, inputs=2))
    exact = 0.7 * a.double() + 0.3 * b.double()
    written = apply(Lerp(t=0.3), a, b).half()
    in_half = (1 - 0.3) * a + 0.3 * b
    assert (written != exact.half()).float().mean() < 5e-3
    assert (in_half != exact.half()).float().mean() > 0.2  # what tools do that merge in the dtype of the file


def test_a_curve_needs_a_share():
    assert Lerp(t=1.5)
    for curve in ("smoothstep", "inverse_smoothstep"):
        with pytest.raises(ValueError, match=r"^t must be from 0 to 1, got 1\.5"):
            Lerp(t=1.5, curve=curve)


def test_sd_mecha_agrees():
    linear = pytest.importorskip("sd_mecha.extensions.builtin.merge_methods.linear")
    a, b = random(6, 50, inputs=2)
    peer = linear.weighted_sum.__wrapped__({"w": a}, {"w": b}, torch.tensor(0.3), key="w")
    torch.testing.assert_close(apply(Lerp(t=0.3), a, b), peer, rtol=1e-6, atol=1e-9)
