"""Soft min-SNR weighting (Crowson et al. 2024, arXiv:2401.11605)."""

from dataclasses import dataclass

from torch import Tensor

from tuner.diffusion.weightings.base import Weighting


@dataclass(frozen=True, kw_only=True)
class SoftMinSnr:
    """SNR gamma / (SNR + gamma) on errors in x_0: `MinSnr` without its corner, half of it at SNR = gamma."""

    gamma: float = 5.0
    """What the weight grows to."""

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")

    def x_0_weight(self, alpha: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        return self.gamma * alpha**2 / (alpha**2 + self.gamma * sigma**2)


SPEC: type[Weighting] = SoftMinSnr
