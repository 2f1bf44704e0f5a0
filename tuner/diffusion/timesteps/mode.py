"""Middle noise levels more often, with the ends still drawn (Esser et al. 2024, arXiv:2403.03206, section 3.1)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.diffusion.timesteps.base import Timesteps


@dataclass(frozen=True, kw_only=True)
class Mode:
    """The paper's "mode sampling with heavy tails"."""

    scale: float = 1.29
    """How much the middle is favoured: 0 is uniform, 1.29 the paper's best, below 0 the ends are; in [-1, 2 / (π - 2)].
    """

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale must lie in [-1, 2 / (pi - 2)], that is up to 1.7519, got {self.scale}")

    def quantile(self, u: Tensor, size: tuple[int, int]) -> Tensor:
        # the paper's formula at 1 - u, where it rises with u
        return u - self.scale * (torch.sin(math.pi / 2 * u) ** 2 - u)


SPEC: type[Timesteps] = Mode
