"""Perception prioritized weighting, P2 (Choi et al. 2022, arXiv:2204.00227)."""

from dataclasses import dataclass

from torch import Tensor

from tuner.diffusion.weightings.base import Weighting


@dataclass(frozen=True, kw_only=True)
class P2:
    """1 / (k + SNR)^gamma on errors in the noise: less for the low noise levels, which hold details nobody sees."""

    gamma: float = 1.0
    """How much less; the paper has 0.5 and 1, and 0 is the plain loss of the noise."""
    k: float = 1.0
    """Where it begins: at SNR = k."""

    def __post_init__(self) -> None:
        if self.gamma < 0 or self.k <= 0:
            raise ValueError(f"gamma must be 0 or more and k positive, got gamma = {self.gamma}, k = {self.k}")

    def x_0_weight(self, alpha: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        snr = (alpha / sigma) ** 2
        return snr * (self.k + snr) ** -self.gamma  # an error in the noise is sqrt(SNR) times one in x_0


SPEC: type[Weighting] = P2
