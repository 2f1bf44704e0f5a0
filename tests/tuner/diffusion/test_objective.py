"""The loss against published formulas, at every time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import toy
from tuner.data.order import Showing
from tuner.diffusion.batch import Batch, Conditioning
from tuner.diffusion.noises.gaussian import Gaussian
from tuner.diffusion.noises.offset import Offset
from tuner.diffusion.objective import Objective
from tuner.diffusion.prediction import Epsilon, Velocity
from tuner.diffusion.schedule import scaled_linear
from tuner.diffusion.timesteps.uniform import Uniform as UniformTimes
from tuner.diffusion.weightings.min_snr import MinSnr
from tuner.diffusion.weightings.uniform import Uniform as UniformWeight
from tuner.rng import Position, generator_at

EVERY = torch.arange(1000)
PREDICTIONS = [Epsilon(), Velocity()]


def named(value: object) -> str:
    return type(value).__name__


class Recorder:
    """A model whose network gives what it was told to, and remembers what it was given."""

    def __init__(self, prediction, output=None) -> None:
        self.schedule, self.prediction = scaled_linear(), prediction
        self.output = output

    def encode_text(self, captions):
        raise AssertionError("captions are encoded already")

    def denoise(self, x_t, t, conditioning):
        self.x_t, self.t = x_t, t
        return torch.zeros_like(x_t) if self.output is None else self.output


def batch_at_every_time(seed: int = 0) -> Batch:
    return Batch(
        latents=torch.randn(1000, 2, 3, 3, generator=torch.Generator().manual_seed(seed)),
        captions=[""] * 1000,
        conditioning=Conditioning(tokens=torch.zeros(1000, 1, 1)),
        weight=torch.ones(1000),
        positions=[Position(seed, 0, sample) for sample in range(1000)],
    )


def noise_of(batch: Batch, noise=None) -> torch.Tensor:
    noise = noise or Gaussian()
    return torch.stack([noise.draw(batch.latents.shape[1:], at.generator("noise")) for at in batch.positions])


def published(prediction, weighting, snr):
    """The weight of the output's squared error: Hang et al. 2023 (eq. 6 to 8 and appendix), SNR = alpha^2 / sigma^2."""
    match prediction, weighting:
        case Epsilon(), MinSnr(gamma=gamma):
            return snr.clamp(max=gamma) / snr
        case Velocity(), MinSnr(gamma=gamma):
            return snr.clamp(max=gamma) / (snr + 1)
        case _:
            return torch.ones_like(snr)


@pytest.mark.parametrize("weighting", [UniformWeight(), MinSnr(), MinSnr(gamma=1.0), MinSnr(gamma=20.0)], ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
def test_loss_and_weight_are_the_published_ones_at_every_time(prediction, weighting):
    """Here in float64 from the definitions: DDPM's eq. 4 and 12, Salimans and Ho's v, Hang et al.'s min-SNR."""
    batch = batch_at_every_time()
    output = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(5))
    model = Recorder(prediction, output)
    loss = Objective(weighting=weighting).loss(model, batch, EVERY)

    alphas_cumprod = model.schedule.alphas_cumprod.double()
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    x_0, noise = batch.latents.double(), noise_of(batch).double()
    wide = (slice(None), None, None, None)
    target = noise if isinstance(prediction, Epsilon) else alpha[wide] * noise - sigma[wide] * x_0
    mse = (output.double() - target).square().mean((1, 2, 3))
    weight = published(prediction, weighting, alphas_cumprod / (1 - alphas_cumprod))

    torch.testing.assert_close(model.x_t.double(), alpha[wide] * x_0 + sigma[wide] * noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss.plain.double(), mse, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.weighted.double(), weight * mse, rtol=1e-5, atol=0)
    assert torch.equal(loss.t, EVERY) and torch.equal(model.t, EVERY)


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
def test_a_perfect_network_has_no_loss(prediction):
    batch = batch_at_every_time()
    alpha, sigma = (level[:, None, None, None] for level in scaled_linear().alpha_sigma(EVERY))
    perfect = prediction.target(batch.latents, noise_of(batch), alpha, sigma)
    assert Objective(weighting=MinSnr()).loss(Recorder(prediction, perfect), batch, EVERY).weighted.max() == 0


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
def test_offset_noise_is_in_the_input_and_in_the_target(prediction):
    batch, noise = batch_at_every_time(), Offset(strength=0.3)
    offset = noise_of(batch, noise)
    alpha, sigma = (level[:, None, None, None] for level in scaled_linear().alpha_sigma(EVERY))
    model = Recorder(prediction, prediction.target(batch.latents, offset, alpha, sigma))
    assert Objective(noise=noise).loss(model, batch, EVERY).plain.max() == 0
    torch.testing.assert_close(model.x_t, alpha * batch.latents + sigma * offset, rtol=0, atol=1e-6)


def test_offset_noise_is_white_noise_with_one_more_draw_a_channel():
    white, offset = noise_of(batch_at_every_time()), noise_of(batch_at_every_time(), Offset(strength=0.3))
    difference = (offset - white).flatten(2)
    torch.testing.assert_close(difference, difference[..., :1].expand_as(difference), rtol=0, atol=1e-6)
    assert abs(float(difference[..., 0].std()) - 0.3) < 0.02
    assert torch.equal(noise_of(batch_at_every_time(), Offset(strength=0.0)), white)


@pytest.mark.parametrize("noise", [Gaussian(), Offset(strength=0.5)], ids=named)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
def test_a_samples_loss_depends_on_its_position_alone_not_on_its_company(prediction, noise):
    model, objective = toy.ToyModel(prediction), Objective(weighting=MinSnr(), noise=noise)
    alike = [Showing(3, sample) for sample in (0, 1, 3, 6)]
    together = objective.loss(model, toy.batch(alike))
    torch.manual_seed(12345)  # the global generator is of no account
    for place, showing in reversed(list(enumerate(alike))):
        alone = objective.loss(model, toy.batch([showing]))
        assert torch.equal(alone.t, together.t[[place]])
        torch.testing.assert_close(alone.weighted, together.weighted[[place]], rtol=1e-5, atol=0)
    for other in (toy.batch([Showing(4, 0)]), toy.batch([Showing(3, 0)], seed=1)):
        assert not torch.equal(objective.loss(model, other).plain, together.plain[:1])


def test_captions_are_encoded_with_gradient_where_they_come_unencoded():
    model = toy.ToyModel()
    batch = toy.batch([Showing(0, 0)])
    Objective().loss(model, batch).weighted.sum().backward()
    assert model.networks["text_encoder"].embedding.weight.grad is not None
    encoded = replace(batch, conditioning=model.encode_text(batch.captions))
    assert torch.equal(Objective().loss(model, encoded).plain, Objective().loss(model, batch).plain)


@given(start=st.integers(0, 999), length=st.integers(1, 1000), sample=st.integers(0, 99))
def test_times_come_from_the_range_that_was_asked_for(start, length, sample):
    end = min(1000, start + length)
    u = torch.rand(8, generator=generator_at("test", sample), dtype=torch.float64)
    drawn = scaled_linear().time_at(UniformTimes(start=start / 1000, end=end / 1000).quantile(u, (8, 8)))
    assert bool(((start <= drawn) & (drawn < end)).all())


def test_every_time_of_a_range_is_drawn_about_equally_often():
    u = torch.rand(2000, generator=generator_at("test"), dtype=torch.float64)
    counts = torch.bincount(
        scaled_linear().time_at(UniformTimes(start=0.57, end=0.58).quantile(u, (8, 8))), minlength=1000
    )
    assert counts[570:580].sum() == 2000
    assert counts[570:580].min() > 130 and counts[570:580].max() < 270


@pytest.mark.parametrize(("start", "end"), [(-0.1, 1.0), (0.0, 1.1), (0.5, 0.5), (0.6, 0.4)])
def test_a_range_that_holds_no_time_is_refused(start, end):
    with pytest.raises(ValueError, match=f"start = {start}, end = {end}"):
        UniformTimes(start=start, end=end)


@pytest.mark.parametrize("gamma", [0.0, -1.0])
def test_a_gamma_that_weighs_nothing_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma must be positive"):
        MinSnr(gamma=gamma)
