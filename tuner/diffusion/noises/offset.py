"""Offset noise: a little of the noise is the same all over a channel (Guttenberg 2023, "Diffusion with offset noise").

A model so trained learns to move a picture's mean, so it can make very dark and very bright pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.diffusion.noises.base import Noise


@dataclass(frozen=True, kw_only=True)
class Offset:
    """noise + strength * N(0, 1) per channel; the prediction's target holds the offset too."""

    strength: float = 0.1
    """The offset's standard deviation; 0.05 to 0.1 is usual."""

    def draw(self, shape: Sequence[int], rng: torch.Generator) -> Tensor:
        noise = torch.randn(tuple(shape), generator=rng)
        return noise + self.strength * torch.randn(shape[0], 1, 1, generator=rng)


SPEC: type[Noise] = Offset
