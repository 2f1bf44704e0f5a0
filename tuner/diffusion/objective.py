"""The training loss."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tuner.diffusion.batch import Batch
from tuner.diffusion.model import DiffusionModel
from tuner.diffusion.noises.base import AnyNoise
from tuner.diffusion.noises.gaussian import Gaussian
from tuner.diffusion.timesteps.base import AnyTimesteps
from tuner.diffusion.timesteps.uniform import Uniform as UniformTimesteps
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

    timesteps: AnyTimesteps = field(default_factory=UniformTimesteps)
    """Which noise levels are drawn, and how often."""
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
            drawn = [self.timesteps.draw(model.schedule.steps, at.generator("timestep")) for at in batch.positions]
            t = torch.tensor(drawn)
        noise = torch.stack([self.noise.draw(x_0.shape[1:], at.generator("noise")) for at in batch.positions])
        t, noise = t.to(x_0.device), noise.to(x_0.device)
        alpha, sigma = model.schedule.alpha_sigma(t)
        alpha_, sigma_ = alpha[:, None, None, None], sigma[:, None, None, None]

        conditioning = batch.conditioning or model.encode_text(batch.captions)
        output = model.denoise(alpha_ * x_0 + sigma_ * noise, t, conditioning)
        target = model.prediction.target(x_0, noise, alpha_, sigma_)
        per_example = (output.float() - target).square().flatten(1).mean(1)

        gain = model.prediction.x_0_gain(alpha, sigma)
        weight = self.weighting.x_0_weight(alpha, sigma, gain) * gain**2
        return Loss(weight * per_example, per_example.detach(), t)
