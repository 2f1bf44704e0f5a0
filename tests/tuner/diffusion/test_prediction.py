"""Laws of every prediction."""

import pytest
import torch

from tuner.diffusion.prediction import Epsilon, Prediction, Velocity
from tuner.diffusion.schedule import scaled_linear

SCHEDULE = scaled_linear()
TIMES = torch.arange(0, 1000, 37)


@pytest.fixture(params=[Epsilon(), Velocity()], ids=lambda prediction: type(prediction).__name__)
def prediction(request) -> Prediction:
    return request.param


def noised(dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    x_0 = torch.randn(len(TIMES), 4, 5, 3, generator=rng, dtype=dtype)
    noise = torch.randn(len(TIMES), 4, 5, 3, generator=rng, dtype=dtype)
    alpha, sigma = (level.to(dtype)[:, None, None, None] for level in SCHEDULE.alpha_sigma(TIMES))
    # the schedule's float32 levels are not quite on the circle that the velocity's inverse needs
    scale = (alpha**2 + sigma**2).sqrt()
    return x_0, noise, alpha / scale, sigma / scale


def test_to_x_0_is_the_inverse_of_target(prediction):
    x_0, noise, alpha, sigma = noised()
    output = prediction.target(x_0, noise, alpha, sigma)
    back = prediction.to_x_0(output, alpha * x_0 + sigma * noise, alpha, sigma)
    torch.testing.assert_close(back, x_0, rtol=0, atol=1e-12)


def test_the_gain_is_the_derivative_of_x_0_by_the_output(prediction):
    x_0, noise, alpha, sigma = noised()
    x_t = alpha * x_0 + sigma * noise
    output = prediction.target(x_0, noise, alpha, sigma).clone().requires_grad_()
    (slope,) = torch.autograd.grad(prediction.to_x_0(output, x_t, alpha, sigma).sum(), output)
    gain = prediction.x_0_gain(alpha, sigma)
    assert (gain > 0).all()
    torch.testing.assert_close(slope.abs(), gain.expand_as(slope), rtol=1e-12, atol=0)


def test_velocity_is_epsilon_turned_by_the_noise_level():
    """v = alpha noise - sigma x_0, and what follows from it: noise = sigma x_t + alpha v."""
    x_0, noise, alpha, sigma = noised()
    v = Velocity().target(x_0, noise, alpha, sigma)
    torch.testing.assert_close(v, alpha * noise - sigma * x_0, rtol=0, atol=0)
    torch.testing.assert_close(sigma * (alpha * x_0 + sigma * noise) + alpha * v, noise, rtol=0, atol=1e-12)
    assert torch.equal(Epsilon().target(x_0, noise, alpha, sigma), noise)
