"""Errors in x_0 count the same at every noise level, whatever the network predicts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.diffusion.weightings.base import Weighting


@dataclass(frozen=True, kw_only=True)
class Clean:
    """The mean squared error of the clean latents that the output implies.

    For v-prediction it is what sd-scripts calls debiased estimation: 1 / (SNR + 1) on the output.
    """

    def x_0_weight(self, alpha: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        return torch.ones_like(gain)


SPEC: type[Weighting] = Clean
