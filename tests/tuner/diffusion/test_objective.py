"""The loss against published formulas, at every time."""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
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
from tuner.diffusion.prediction import Epsilon, FlowVelocity, Velocity
from tuner.diffusion.schedule import Flow, scaled_linear
from tuner.diffusion.timesteps.logit_normal import LogitNormal
from tuner.diffusion.timesteps.uniform import Uniform as UniformTimes
from tuner.diffusion.weightings.min_snr import MinSnr
from tuner.diffusion.weightings.uniform import Uniform as UniformWeight
from tuner.errors import DataError
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


# Masks


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_a_masked_loss_is_the_mean_by_the_masks_weights_for_each_example(prediction, floor):
    """OneTrainer's, with its normalisation: sum of m l / sum of m, with m no less than the floor."""
    batch = batch_at_every_time()
    mask = torch.rand(1000, 1, 3, 3, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    model = Recorder(prediction)
    found = Objective(unmasked_weight=floor).loss(model, replace(batch, mask=mask), EVERY)
    alpha, sigma = (level[:, None, None, None] for level in scaled_linear().alpha_sigma(EVERY))
    error = prediction.target(batch.latents, noise_of(batch), alpha, sigma).double().square()
    m = mask.double().clamp(floor, 1).expand_as(error)
    torch.testing.assert_close(
        found.weighted.double(), (error * m).sum((1, 2, 3)) / m.sum((1, 2, 3)), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(found.plain.double(), error.mean((1, 2, 3)), rtol=1e-5, atol=0)


def test_a_mask_of_ones_and_a_mask_that_is_alike_all_over_are_no_masks():
    batch, objective = batch_at_every_time(), Objective()
    plain = objective.loss(Recorder(Epsilon()), batch, EVERY).weighted
    for level in (1.0, 0.3):
        masked = replace(batch, mask=torch.full((1000, 1, 3, 3), level))
        torch.testing.assert_close(objective.loss(Recorder(Epsilon()), masked, EVERY).weighted, plain)


def test_nothing_is_learned_from_a_place_that_is_black_and_all_of_it_where_the_floor_is_1():
    model, batch = toy.ToyModel(), toy.batch([Showing(0, 0), Showing(0, 1)])
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :, :4] = 1
    changed = batch.latents.clone()
    changed[:, :, :, 6:] += 5  # so far from the white half that no convolution carries it over
    told = replace(batch, mask=mask, conditioning=model.encode_text(batch.captions))
    model.networks["unet"] = torch.nn.Module()
    model.denoise = lambda x_t, t, conditioning: 0.5 * x_t
    losses = [Objective().loss(model, replace(told, latents=x_0)).weighted for x_0 in (batch.latents, changed)]
    assert torch.equal(*losses)
    floored = [
        Objective(unmasked_weight=1.0).loss(model, replace(told, mask=m)).weighted
        for m in (mask, torch.ones_like(mask))
    ]
    assert torch.equal(*floored) and not torch.equal(floored[0], losses[0])


def test_a_mask_by_which_nothing_counts_is_refused_by_its_caption():
    """Its mean is 0 / 0; taken as 0 the picture would be passed over in silence."""
    batch = replace(batch_at_every_time(), captions=[f"thing {row}" for row in range(1000)])
    mask = torch.zeros(1000, 1, 3, 3)
    mask[:, :, 1, 1] = 1e-4
    mask[7] = 0
    with pytest.raises(DataError, match=r"captioned 'thing 7' is black wherever .*; draw the mask, leave"):
        Objective().loss(Recorder(Epsilon()), replace(batch, mask=mask), EVERY)
    black, none = (
        Objective(unmasked_weight=0.1).loss(Recorder(Epsilon()), replace(batch, mask=m), EVERY).weighted
        for m in (mask, None)
    )
    assert none is not None and black[7] == pytest.approx(none[7])  # black then counts as much as anything else


# Input perturbation


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
def test_perturbed_noise_is_seen_and_not_asked_for(prediction):
    """Ning et al., algorithm 1: the input holds noise + gamma xi, the target the noise alone."""
    batch = batch_at_every_time()
    alpha, sigma = (level[:, None, None, None] for level in scaled_linear().alpha_sigma(EVERY))
    noise = noise_of(batch)
    model = Recorder(prediction, prediction.target(batch.latents, noise, alpha, sigma))
    assert Objective(input_perturbation=0.1).loss(model, batch, EVERY).plain.max() == 0
    more = (model.x_t - alpha * batch.latents - sigma * noise) / (0.1 * sigma)
    assert abs(float(more.mean())) < 0.03 and abs(float(more.std()) - 1) < 0.03
    assert abs(float((more * noise).mean())) < 0.03
    again = Recorder(prediction)
    Objective(input_perturbation=0.1).loss(again, replace(batch, positions=batch.positions[::-1]), EVERY)
    assert not torch.equal(again.x_t, model.x_t)


# Evenly spread times


def times_of(objective: Objective, size: int, updates: int) -> torch.Tensor:
    """The shares of time that the samples of updates are noised to, `[updates, size]`."""
    count = updates * size
    batch = Batch(
        latents=torch.zeros(count, 1, 2, 2),
        captions=[""] * count,
        conditioning=Conditioning(tokens=torch.zeros(count, 1, 1)),
        weight=torch.ones(count),
        positions=[Position(0, 0, place, (*divmod(place, size), size)) for place in range(count)],
    )
    model = Recorder(FlowVelocity())
    model.schedule, model.timesteps = Flow(), UniformTimes()
    return objective.loss(model, batch).t.double().reshape(updates, size) / 1000


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_each_update_has_one_stratified_time_in_each_of_as_many_equal_parts(size):
    times = times_of(Objective(stratified=True), size, 50)
    assert torch.equal((times * size).long().sort(1).values, torch.arange(size).expand(50, size))


@pytest.mark.parametrize("index", [0, 3])
def test_a_stratified_time_by_itself_is_any_time_with_equal_chance(index):
    """Kolmogorov and Smirnov: 3000 uniform numbers stray by less than 0.05 in all but one of 10^6 cases."""
    times = times_of(Objective(stratified=True), 4, 3000)[:, index].sort().values
    assert float((times - (torch.arange(3000) + 0.5) / 3000).abs().max()) < 0.05


def test_a_distribution_of_times_is_kept_when_it_is_stratified():
    times = times_of(Objective(stratified=True, timesteps=LogitNormal()), 8, 400).flatten()
    logits = torch.logit(times)
    assert abs(float(logits.mean())) < 0.01 and abs(float(logits.std()) - 1) < 0.02


class Ones:
    """No chance but that of times."""

    def draw(self, shape, rng):
        return torch.ones(shape)


@pytest.mark.parametrize(("size", "factor"), [(4, 1.4), (8, 5), (32, 60)])
def test_stratified_times_make_an_updates_loss_vary_far_less(size, factor):
    """The loss of a network that says nothing, with min-SNR's weights, which depends on time alone: its variance over
    updates falls by more than `factor`, and its mean stays."""
    blank = Batch(
        latents=torch.zeros(size, 1, 2, 2),
        captions=[""] * size,
        conditioning=Conditioning(tokens=torch.zeros(size, 1, 1)),
        weight=torch.ones(size),
        positions=[],
    )
    model = Recorder(Epsilon())
    model.timesteps = UniformTimes()
    spread: list[float] = []
    means: list[float] = []
    for stratified in (False, True):
        objective = Objective(stratified=stratified, weighting=MinSnr(), noise=Ones())
        losses: list[float] = []
        for start in range(0, 300 * size, size):
            batch = replace(
                blank, positions=[Position(0, 0, at, (*divmod(at, size), size)) for at in range(start, start + size)]
            )
            losses.append(float(objective.loss(model, batch).weighted.mean()))
        spread.append(float(torch.tensor(losses).var()))
        means.append(float(torch.tensor(losses).mean()))
    assert spread[1] < spread[0] / factor
    assert means[1] == pytest.approx(means[0], rel=0.05)


@pytest.mark.parametrize("world", [1, 2])
def test_stratified_times_depend_on_the_place_in_the_run_and_on_no_split(world):
    def drawn(micro_batch: int, world: int, first: int = 0) -> dict[tuple[int, int], float]:
        found: dict[tuple[int, int], float] = {}
        model, objective = toy.ToyModel(), Objective(stratified=True)
        for rank in range(world):
            stream = toy.stream(4, micro_batch, rank, world)(first)
            for _ in range(5):
                for batch in next(stream).micro_batches:
                    times = objective.loss(model, batch).t.tolist()
                    found |= {(at.epoch, at.sample): t for at, t in zip(batch.positions, times, strict=True)}
        return found

    whole = drawn(4, 1)
    assert len(whole) == 20 and len(set(whole.values())) > 15
    assert drawn(1, world) == drawn(3, world) == whole
    later = drawn(4, world, first=8)
    assert {at: t for at, t in later.items() if at in whole} == {at: t for at, t in whole.items() if at in later}
    assert len(later.keys() & whole.keys()) == 12


def test_a_showing_of_no_run_has_no_stratified_time():
    with pytest.raises(AssertionError, match="one of an update"):
        Objective(stratified=True).loss(toy.ToyModel(), toy.batch([Showing(0, 0)]))


# The base's own prediction as target


@contextmanager
def halved(model: toy.ToyModel) -> Generator[None]:
    """Another network in place of the one that learns, as an untrained one would be."""
    with torch.no_grad():
        for p in model.networks["unet"].parameters():
            p.mul_(0.5)
        yield
        for p in model.networks["unet"].parameters():
            p.mul_(2)


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
def test_a_prior_example_has_the_untrained_models_output_for_the_same_noise_and_time(prediction, encoded):
    model = toy.ToyModel(prediction)
    model.untrained = lambda: halved(model)
    batch = toy.batch([Showing(0, 0), Showing(0, 1), Showing(0, 3), Showing(0, 6)])
    if encoded:
        batch = replace(batch, conditioning=model.encode_text(batch.captions))
    objective = Objective(weighting=MinSnr())
    plain = objective.loss(model, batch)
    mixed = objective.loss(model, replace(batch, prior=torch.tensor([False, True, False, True])))
    assert torch.equal(plain.t, mixed.t)
    torch.testing.assert_close(mixed.weighted[[0, 2]], plain.weighted[[0, 2]])

    alpha, sigma = (level[:, None, None, None] for level in model.schedule.alpha_sigma(plain.t))
    x_t = alpha * batch.latents + sigma * noise_of(batch)
    told = model.encode_text(batch.captions)
    with torch.no_grad():
        now = model.denoise(x_t, plain.t, told)
        with halved(model):
            base = model.denoise(x_t, plain.t, told)
    torch.testing.assert_close(mixed.plain[[1, 3]], (now - base).square().flatten(1).mean(1)[[1, 3]])
    torch.testing.assert_close(mixed.weighted / plain.weighted, mixed.plain / plain.plain)


def test_a_prior_example_of_an_untrained_model_has_no_loss_and_no_gradient_reaches_the_target():
    model = toy.ToyModel()
    model.untrained = nullcontext
    batch = replace(toy.batch([Showing(0, 0), Showing(0, 1)]), prior=torch.tensor([True, False]))
    loss = Objective().loss(model, batch)
    assert loss.weighted[0] < 1e-12 and loss.weighted[1] > 0.1  # batches of one and of two round otherwise
    loss.weighted[0].backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-5 for p in model.networks["unet"].parameters())


def test_a_prior_example_needs_a_model_that_was_kept():
    batch = replace(toy.batch([Showing(0, 0)]), prior=torch.tensor([True]))
    with pytest.raises(AssertionError, match="not kept"):
        Objective().loss(toy.ToyModel(), batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(input_perturbation=-0.1), "input_perturbation must not be negative"),
        (lambda: Objective(unmasked_weight=1.5), "unmasked_weight must lie in"),
    ],
)
def test_what_an_objective_cannot_mean_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
