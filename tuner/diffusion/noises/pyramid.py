"""Pyramid noise, or multi-resolution noise (Whitaker 2023, "Multi-resolution noise for diffusion model training").

Like offset noise it teaches a model to change large parts of a picture at once, on every scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.diffusion.noises.base import Noise


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """White noise, and white noise of ever fewer pixels enlarged to the same size, together of variance 1.

    The sides at level i are r^i times shorter, with r drawn from [2, 4) at each level; the last level is one whose side
    is one pixel.
    """

    discount: float = 0.3
    """Level i is multiplied by discount^i; in [0, 1]."""
    levels: int = 6
    """The most levels there are, the full size counted."""

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount must lie in [0, 1], got {self.discount}")
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}")

    def draw(self, shape: Sequence[int], rng: torch.Generator) -> Tensor:
        channels, height, width = shape
        noise = torch.randn(channels, height, width, generator=rng)
        for level in range(self.levels):
            shorter = (2 + 2 * float(torch.rand((), generator=rng))) ** level
            size = max(1, int(height / shorter)), max(1, int(width / shorter))
            coarse = torch.randn(1, channels, *size, generator=rng)
            enlarged = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
            noise += self.discount**level * enlarged[0]
            if 1 in size:
                break
        return noise / noise.std()


SPEC: type[Noise] = Pyramid
