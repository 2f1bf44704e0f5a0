"""What is added to latents in training."""

from collections.abc import Sequence
from typing import Annotated, Protocol

import torch
from torch import Tensor

from tuner.plugins import Folder


class Noise(Protocol):
    """A distribution of noise for one example."""

    def draw(self, shape: Sequence[int], rng: torch.Generator) -> Tensor:
        """Noise of `shape` `[C, h, w]`, float32 on the CPU."""
        ...


AnyNoise = Annotated[Noise, Folder("tuner.diffusion.noises")]
