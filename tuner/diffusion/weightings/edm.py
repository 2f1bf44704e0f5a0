"""EDM's weighting (Karras et al. 2022, arXiv:2206.00364, table 1)."""

from dataclasses import dataclass

from torch import Tensor

from tuner.diffusion.weightings.base import Weighting


@dataclass(frozen=True, kw_only=True)
class Edm:
    """(n² + s²) / (n s)² on errors in x_0, where n = sigma / alpha and s is the data's standard deviation.

    That is SNR + 1 / s². With s = 1 it is, for a variance-preserving schedule, the plain loss of the velocity v.
    """

    sigma_data: float = 0.5
    """s; the paper's 0.5 is of pixels, scaled latents have about 1."""

    def __post_init__(self) -> None:
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}")

    def x_0_weight(self, alpha: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        return (alpha / sigma) ** 2 + self.sigma_data**-2


SPEC: type[Weighting] = Edm
