"""The training loss."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tuner.diffusion.batch import Batch
from tuner.diffusion.measures.base import AnyMeasure, Level
from tuner.diffusion.measures.squared import Squared
from tuner.diffusion.model import DiffusionModel
from tuner.diffusion.noises.base import AnyNoise
from tuner.diffusion.noises.gaussian import Gaussian
from tuner.diffusion.timesteps.base import AnyTimesteps
from tuner.diffusion.weightings.base import AnyWeighting
from tuner.diffusion.weightings.uniform import Uniform as UniformWeighting
from tuner.errors import DataError
from tuner.rng import Position, generator_at


@dataclass(frozen=True)
class Loss:
    """A batch's loss, and its parts for those who plot them."""

    weighted: Tensor
    """`[B]`: the error with its noise level's weight; differentiated."""
    plain: Tensor
    """`[B]`: the mean squared error of the network's output, the same whatever the objective; detached."""
    t: Tensor
    """`[B]`, the time each example was noised to."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Denoise latents at random noise levels."""

    timesteps: AnyTimesteps | None = None
    """Which noise levels are drawn, and how often; the family's own choice where left out."""
    stratified: bool = False
    """Whether the noise levels of the samples of an update are spread evenly, and not each drawn by itself: the same
    levels on average, with less chance in each update."""
    weighting: AnyWeighting = field(default_factory=UniformWeighting)
    """How much each noise level counts."""
    error: AnyMeasure = field(default_factory=Squared)
    """How an error of the network's output is measured."""
    noise: AnyNoise = field(default_factory=Gaussian)
    """What is added to the latents, and has to be told from them."""
    input_perturbation: float = 0.0
    """More noise, of this share, that the network is not told of: it sees it, and its target does not hold it (Ning et
    al. 2023, arXiv:2301.11706, who use 0.1)."""
    unmasked_weight: float = 0.0
    """The least weight of a place, where pictures have masks: what the black of a mask counts."""

    def __post_init__(self) -> None:
        if self.input_perturbation < 0:
            raise ValueError(f"input_perturbation must not be negative, got {self.input_perturbation}")
        if not 0 <= self.unmasked_weight <= 1:
            raise ValueError(f"unmasked_weight must lie in [0, 1], got {self.unmasked_weight}")

    def loss(self, model: DiffusionModel, batch: Batch, t: Tensor | None = None) -> Loss:
        """The loss of each example of `batch`, before its own weight; all randomness comes from its position.

        `t`, `[B]`, fixes the times (for validation) that are otherwise drawn.

        Raises:
            DataError: a mask that is black all over, where what is masked does not count.
        """
        x_0 = batch.latents
        if t is None:
            t = self._times(model, batch)
        noise = torch.stack([self.noise.draw(x_0.shape[1:], at.generator("noise")) for at in batch.positions])
        t, noise = t.to(x_0.device), noise.to(x_0.device)
        alpha, sigma = model.schedule.alpha_sigma(t)
        alpha_, sigma_ = alpha[:, None, None, None], sigma[:, None, None, None]
        x_t = alpha_ * x_0 + sigma_ * self._perturbed(noise, batch.positions)

        target = model.prediction.target(x_0, noise, alpha_, sigma_)
        if batch.prior is not None:
            target = _with_prior(target, model, batch, x_t, t)
        conditioning = batch.conditioning or model.encode_text(batch.captions)
        output = model.denoise(x_t, t, replace(conditioning, frame=batch.frame, image=batch.image))
        difference = output.float() - target
        share = t[:, None, None, None].float() / model.schedule.steps
        error = self.error.of(difference, Level(share, alpha_, sigma_))

        gain = model.prediction.x_0_gain(alpha, sigma)
        weight = self.weighting.x_0_weight(alpha, sigma, gain) * gain**2
        plain = difference.detach().square().flatten(1).mean(1)
        return Loss(weight * self._mean(error, batch), plain, t)

    def _times(self, model: DiffusionModel, batch: Batch) -> Tensor:
        """A time for each example, `[B]`."""
        if self.stratified:
            u = torch.tensor([_evenly(at) for at in batch.positions], dtype=torch.float64)
        else:
            u = torch.stack([_uniform(model.schedule.steps, at.generator("timestep")) for at in batch.positions])
        timesteps = self.timesteps or model.timesteps
        return model.schedule.time_at(timesteps.quantile(u, (batch.latents.shape[2], batch.latents.shape[3])))

    def _perturbed(self, noise: Tensor, positions: Sequence[Position]) -> Tensor:
        """The noise that the network sees."""
        if not self.input_perturbation:
            return noise
        more = [torch.randn(noise.shape[1:], generator=at.generator("input perturbation")) for at in positions]
        return noise + self.input_perturbation * torch.stack(more).to(noise.device)

    def _mean(self, error: Tensor, batch: Batch) -> Tensor:
        """Of each example, over its elements: by their weights, so that a small mask counts as much as a large one.

        Raises:
            DataError: a mask by which nothing counts, so that there is no mean.
        """
        if batch.mask is None:
            return error.flatten(1).mean(1)
        weight = batch.mask.clamp(min=self.unmasked_weight).flatten(1)
        whole = weight.sum(1)
        if not bool((whole > 0).all()):
            row = int(whole.argmin())
            raise DataError(
                f"the mask of a picture captioned {batch.captions[row]!r} is black wherever the picture is shown, so "
                "nothing of it counts; draw the mask, leave the picture out, or set objective.unmasked_weight above 0 "
                "(`tuner check` names the file)"
            )
        return (error.mean(1).flatten(1) * weight).sum(1) / whole


def _with_prior(target: Tensor, model: DiffusionModel, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
    """`target`, where the examples of `batch.prior` have what the untrained model gives for the same noise and time."""
    assert batch.prior is not None and model.untrained is not None, "the untrained model was not kept"
    rows = [row for row, prior in enumerate(batch.prior) if prior]
    if not rows:
        return target
    target = target.clone()
    with model.untrained(), torch.no_grad():
        if batch.conditioning is None:
            conditioning = model.encode_text([batch.captions[row] for row in rows])
        else:
            conditioning = batch.conditioning.each(lambda part: part[rows])
        frame, image = (None if part is None else part[rows] for part in (batch.frame, batch.image))
        target[rows] = model.denoise(x_t[rows], t[rows], replace(conditioning, frame=frame, image=image)).float()
    return target


def _uniform(steps: int, rng: torch.Generator) -> Tensor:
    """A number in (0, 1), float64: one of `steps` equal parts, then a place in it."""
    part = torch.randint(steps, (), generator=rng)
    return (part + torch.rand((), generator=rng, dtype=torch.float64)) / steps


def _evenly(at: Position) -> float:
    """A number in (0, 1), in another of n equal parts for each of the n samples of an update: jittered sampling (Cook
    1986), in which each number by itself is as likely as any."""
    assert at.stratum is not None, "only a showing of a training run is one of an update's"
    update, index, size = at.stratum
    turn = int(torch.randint(size, (), generator=generator_at(at.seed, "stratified", update)))
    return (
        (index + turn) % size + float(torch.rand((), generator=at.generator("timestep"), dtype=torch.float64))
    ) / size
