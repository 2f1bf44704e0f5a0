"""Plain white noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.diffusion.noises.base import Noise


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """N(0, 1) in every element."""

    def draw(self, shape: Sequence[int], rng: torch.Generator) -> Tensor:
        return torch.randn(tuple(shape), generator=rng)


SPEC: type[Noise] = Gaussian
