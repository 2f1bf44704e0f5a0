"""What the network is asked to predict, and what that says about x_0.

Shapes: x_0, noise, x_t and outputs are `[B, C, h, w]`; alpha and sigma are `[B, 1, 1, 1]`.
"""

from typing import Protocol

import torch
from torch import Tensor


class Prediction(Protocol):
    """One parameterization of the denoiser's output."""

    def target(self, x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What a perfect network would output."""
        ...

    def to_x_0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean latents that `output` implies: the inverse of `target`."""
        ...

    def x_0_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """|d x_0 / d output|: how an error in the output shows in x_0."""
        ...


class Epsilon:
    """The noise itself (Ho et al. 2020, arXiv:2006.11239)."""

    def target(self, x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def to_x_0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x_t - sigma * output) / alpha

    def x_0_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / alpha


class Velocity:
    """v = alpha noise - sigma x_0 (Salimans and Ho 2022, arXiv:2202.00512)."""

    def target(self, x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * x_0

    def to_x_0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * x_t - sigma * output

    def x_0_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma


class FlowVelocity:
    """noise - x_0: how x_t moves with the noise level on a straight line (Liu et al. 2022, arXiv:2209.03003)."""

    def target(self, x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - x_0

    def to_x_0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t - sigma * output

    def x_0_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma


class Clean:
    """x_0 itself."""

    def target(self, x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_0

    def to_x_0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output

    def x_0_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)
