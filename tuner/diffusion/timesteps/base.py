"""Which noise levels training draws."""

from typing import Annotated, Protocol

import torch

from tuner.plugins import Folder


class Timesteps(Protocol):
    """A distribution over training times."""

    def draw(self, steps: int, rng: torch.Generator) -> int:
        """A time in [0, steps)."""
        ...


AnyTimesteps = Annotated[Timesteps, Folder("tuner.diffusion.timesteps")]
