"""Laws of every measure of an error, and pseudo-Huber against its formulas."""

import math

import pytest
import torch

from tuner.diffusion.measures.base import Level
from tuner.diffusion.measures.huber import Huber
from tuner.diffusion.measures.squared import Squared
from tuner.diffusion.schedule import Flow, Schedule, rescale_zero_terminal_snr, scaled_linear
from tuner.plugins import Folder

EVERY = [Folder("tuner.diffusion.measures").find(name)() for name in Folder("tuner.diffusion.measures").names()]
MORE = [Huber(delta=3.0), Huber(delta=0.05, schedule="exponential"), Huber(delta=0.05, schedule="snr")]
SCHEDULES = [scaled_linear(), rescale_zero_terminal_snr(scaled_linear()), Flow()]


def level(schedule: Schedule, times: torch.Tensor) -> Level:
    alpha, sigma = schedule.alpha_sigma(times)
    return Level(*(part[:, None, None, None].double() for part in (times / schedule.steps, alpha, sigma)))


def at_every_time(schedule: Schedule) -> tuple[torch.Tensor, Level]:
    times = torch.arange(1, 1000)
    rng = torch.Generator().manual_seed(3)
    return torch.randn(len(times), 2, 3, 4, generator=rng, dtype=torch.float64), level(schedule, times)


@pytest.mark.parametrize("measure", EVERY + MORE, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=["scaled_linear", "zero_terminal", "flow"])
def test_an_error_is_zero_where_there_is_none_grows_with_its_size_and_has_no_sign(measure, schedule):
    difference, there = at_every_time(schedule)
    error = measure.of(difference, there)
    assert error.shape == difference.shape and bool((error > 0).all())
    assert bool((measure.of(torch.zeros_like(difference), there) == 0).all())
    assert torch.equal(measure.of(-difference, there), error)
    assert bool((measure.of(1.01 * difference, there) > error).all())


@pytest.mark.parametrize("measure", EVERY + MORE, ids=str)
def test_the_gradient_is_finite_even_where_there_is_no_error(measure):
    difference, there = at_every_time(rescale_zero_terminal_snr(scaled_linear()))
    difference[:, :, 0] = 0
    difference.requires_grad_()
    (slope,) = torch.autograd.grad(measure.of(difference, there).sum(), difference)
    assert bool(slope.isfinite().all()) and bool((slope[:, :, 0] == 0).all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["scaled_linear", "zero_terminal", "flow"])
@pytest.mark.parametrize("kind", ["constant", "exponential", "snr"])
def test_huber_is_the_published_formula_at_every_time(kind, schedule):
    difference, there = at_every_time(schedule)
    delta = torch.full_like(there.share, 0.1)
    if kind == "exponential":  # exp(-a t), a = -ln(delta) / T
        delta = torch.exp(math.log(0.1) * there.share)
    if kind == "snr":
        delta = (1 - 0.1) / (1 + there.sigma / there.alpha) ** 2 + 0.1
    published = 2 * delta * (torch.sqrt(difference**2 + delta**2) - delta)
    torch.testing.assert_close(Huber(delta=0.1, schedule=kind).of(difference, there), published, rtol=1e-9, atol=1e-12)


def test_huber_is_the_squared_error_of_small_ones_and_linear_in_large_ones():
    there = level(scaled_linear(), torch.tensor([500]))
    small, large = torch.full((1, 1, 1, 1), 1e-4), torch.full((1, 1, 1, 1), 1e4)
    assert float(Huber(delta=0.5).of(small, there)) == pytest.approx(1e-8, rel=1e-5)
    assert float(Huber(delta=0.5).of(large, there)) == pytest.approx(2 * 0.5 * 1e4, rel=1e-3)
    squared = Squared().of(torch.full((1, 1, 1, 1), 0.3), there)
    torch.testing.assert_close(Huber(delta=1e4).of(torch.full((1, 1, 1, 1), 0.3), there).float(), squared)


@pytest.mark.parametrize("kind", ["exponential", "snr"])
def test_a_scheduled_delta_falls_from_1_to_what_was_given(kind):
    """Robust where all is noise, the squared error's where details are."""
    ends = level(Flow(), torch.tensor([0.0, 1000.0]))
    large = torch.full((2, 1, 1, 1), 1e6, dtype=torch.float64)
    slopes = (Huber(delta=0.1, schedule=kind).of(large, ends) / (2 * large)).flatten().tolist()
    assert slopes == pytest.approx([1.0, 0.1], rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: Huber(delta=0.0), "delta must be positive"), (lambda: Huber(delta=1.0, schedule="snr"), "below 1")],
)
def test_a_delta_that_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
