"""Min-SNR weighting (Hang et al. 2023, arXiv:2303.09556)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.diffusion.weightings.base import Weighting


@dataclass(frozen=True, kw_only=True)
class MinSnr:
    """min(SNR, gamma) on errors in x_0: the low-noise levels stop dominating the gradient."""

    gamma: float = 5.0
    """Where the weight stops growing; the paper's 5 suits most."""

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")

    def x_0_weight(self, alpha: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        return torch.clamp((alpha / sigma) ** 2, max=self.gamma)  # the prediction's gain does the rest


SPEC: type[Weighting] = MinSnr
