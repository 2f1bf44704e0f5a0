"""Noise levels of a beta distribution: anything between uniform, one end, the middle and both ends."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.diffusion.timesteps.base import Timesteps

POINTS = 65537
"""Of the table that quantiles are read off; they are right to about 1e-6."""


@dataclass(frozen=True, kw_only=True)
class Beta:
    """Of density t^(alpha - 1) (1 - t)^(beta - 1), up to a constant; 1 and 1 is uniform."""

    alpha: float = 2.0
    """Larger is more noise; at least 0.5."""
    beta: float = 2.0
    """Larger is less noise; at least 0.5."""

    def __post_init__(self) -> None:
        if self.alpha < 0.5 or self.beta < 0.5:
            raise ValueError(f"alpha and beta must be at least 0.5, got alpha = {self.alpha}, beta = {self.beta}")

    def quantile(self, u: Tensor, size: tuple[int, int]) -> Tensor:
        angles, cumulated = _table(self.alpha, self.beta)
        place = torch.searchsorted(cumulated, u).clamp(1, POINTS - 1)
        below, above = cumulated[place - 1], cumulated[place]
        part = (u - below) / (above - below).clamp(min=1e-300)
        return torch.sin(torch.lerp(angles[place - 1], angles[place], part)) ** 2


@functools.cache
def _table(alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Angles in [0, π/2], whose squared sines are times, and the share of draws up to each.

    Over angles the density is finite.
    """
    angles = torch.linspace(0, math.pi / 2, POINTS, dtype=torch.float64)
    logarithm = angles.sin().clamp(min=1e-300).log()
    logarithm = (2 * alpha - 1) * logarithm + (2 * beta - 1) * logarithm.flip(0)
    density = torch.exp(logarithm - logarithm.max())
    cumulated = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density)])
    return angles, cumulated / cumulated[-1]


SPEC: type[Timesteps] = Beta
