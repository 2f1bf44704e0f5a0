"""The noise levels of the cosine schedule (Nichol and Dhariwal 2021), drawn on a straight line.

Esser et al. 2024, arXiv:2403.03206, section 3.1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.diffusion.timesteps.base import Timesteps


@dataclass(frozen=True, kw_only=True)
class CosMap:
    """Of density 2 / (π - 2πt + 2πt²): log SNR is distributed as with the cosine schedule and uniform times."""

    def quantile(self, u: Tensor, size: tuple[int, int]) -> Tensor:
        angle = math.pi / 2 * u
        return torch.sin(angle) / (
            torch.sin(angle) + torch.cos(angle)
        )  # the paper's 1 - 1 / (tan + 1), finite at u = 1


SPEC: type[Timesteps] = CosMap
