"""Cosmap weighting (Esser et al. 2024, arXiv:2403.03206, section 3.1): the cosine schedule's emphasis, as weights."""

import math
from dataclasses import dataclass

from torch import Tensor

from tuner.diffusion.schedule import flow_share
from tuner.diffusion.weightings.base import Weighting


@dataclass(frozen=True, kw_only=True)
class CosMap:
    """2 / (π - 2πs + 2πs²) on errors in the flow's velocity noise - x_0, s being the flow's noise level.

    It is the density of the times that `type = "cosmap"` of the timesteps draws. Another schedule's levels count as the
    flow's level of the same SNR.
    """

    def x_0_weight(self, alpha: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        s = flow_share(alpha, sigma)
        return 2 / (math.pi * (1 - 2 * s + 2 * s**2)) / s**2  # an error in the velocity is 1 / s times one in x_0


SPEC: type[Weighting] = CosMap
