"""Another distribution's noise levels, moved towards more noise the larger the picture is, as Flux samples.

Black Forest Labs 2024, the scheduler of FLUX.1 (`use_dynamic_shifting`).
"""

import math
from dataclasses import dataclass, field

from torch import Tensor

from tuner.diffusion.timesteps.base import AnyTimesteps, Timesteps
from tuner.diffusion.timesteps.logit_normal import LogitNormal
from tuner.diffusion.timesteps.shifted import shifted

FEWEST, MOST = 256, 4096
"""Tokens, each 2 x 2 latents, of pictures of 256 x 256 and of 1024 x 1024 pixels, where latents have 1/8 of a side."""


@dataclass(frozen=True, kw_only=True)
class ShiftedBySize:
    """As `Shifted`, by e^μ, with μ linear in the number of the picture's tokens: by 3.16 for 1024 x 1024 pixels."""

    base: float = 0.5
    """μ for 256 tokens, a picture of 256 x 256 pixels."""
    max: float = 1.15
    """μ for 4096 tokens, a picture of 1024 x 1024 pixels; the line goes on from there."""
    of: AnyTimesteps = field(default_factory=LogitNormal)
    """The distribution that is shifted."""

    def shift(self, size: tuple[int, int]) -> float:
        """e^μ for latents of this height and width."""
        tokens = (size[0] // 2) * (size[1] // 2)
        return math.exp(self.base + (self.max - self.base) * (tokens - FEWEST) / (MOST - FEWEST))

    def quantile(self, u: Tensor, size: tuple[int, int]) -> Tensor:
        return shifted(self.of.quantile(u, size), self.shift(size))


SPEC: type[Timesteps] = ShiftedBySize
