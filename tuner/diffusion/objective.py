"""The training loss."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tuner.diffusion.batch import Batch
from tuner.diffusion.model import DiffusionModel
from tuner.diffusion.noises.base import AnyNoise
from tuner.diffusion.noises.gaussian import Gaussian
from tuner.diffusion.timesteps.base import AnyTimesteps
from tuner.diffusion.weightings.base import AnyWeighting
from tuner.diffusion.weightings.uniform import Uniform as UniformWeighting


@dataclass(frozen=True)
class Loss:
    """A batch's loss, and its parts for those who plot them."""

    weighted: Tensor
    """`[B]`: the squared error with its noise level's weight; differentiated."""
    plain: Tensor
    """`[B]`: the mean squared error of the network's output, detached."""
    t: Tensor
    """`[B]`, the time each example was noised to."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Denoise latents at random noise levels."""

    timesteps: AnyTimesteps | None = None
    """Which noise levels are drawn, and how often; the family's own choice where left out."""
    weighting: AnyWeighting = field(default_factory=UniformWeighting)
    """How much each noise level counts."""
    noise: AnyNoise = field(default_factory=Gaussian)
    """What is added to the latents."""

    def loss(self, model: DiffusionModel, batch: Batch, t: Tensor | None = None) -> Loss:
        """The loss of each example of `batch`, before its own weight; all randomness comes from its position.

        `t`, `[B]`, fixes the times (for validation) that are otherwise drawn.
        """
        x_0 = batch.latents
        if t is None:
            u = torch.stack([_uniform(model.schedule.steps, at.generator("timestep")) for at in batch.positions])
            timesteps = self.timesteps or model.timesteps
            t = model.schedule.time_at(timesteps.quantile(u, (x_0.shape[2], x_0.shape[3])))
        noise = torch.stack([self.noise.draw(x_0.shape[1:], at.generator("noise")) for at in batch.positions])
        t, noise = t.to(x_0.device), noise.to(x_0.device)
        alpha, sigma = model.schedule.alpha_sigma(t)
        alpha_, sigma_ = alpha[:, None, None, None], sigma[:, None, None, None]

        conditioning = batch.conditioning or model.encode_text(batch.captions)
        conditioning = replace(conditioning, frame=batch.frame, image=batch.image)
        output = model.denoise(alpha_ * x_0 + sigma_ * noise, t, conditioning)
        target = model.prediction.target(x_0, noise, alpha_, sigma_)
        per_example = (output.float() - target).square().flatten(1).mean(1)

        gain = model.prediction.x_0_gain(alpha, sigma)
        weight = self.weighting.x_0_weight(alpha, sigma, gain) * gain**2
        return Loss(weight * per_example, per_example.detach(), t)


def _uniform(steps: int, rng: torch.Generator) -> Tensor:
    """A number in (0, 1), float64: one of `steps` equal parts, then a place in it."""
    part = torch.randint(steps, (), generator=rng)
    return (part + torch.rand((), generator=rng, dtype=torch.float64)) / steps
