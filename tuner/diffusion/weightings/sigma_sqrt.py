"""1 / s², s being the flow's noise level: `sigma_sqrt` of diffusers' scripts for flow matching."""

from dataclasses import dataclass

from torch import Tensor

from tuner.diffusion.schedule import flow_share
from tuner.diffusion.weightings.base import Weighting


@dataclass(frozen=True, kw_only=True)
class SigmaSqrt:
    """1 / s² on errors in the flow's velocity noise - x_0: low noise levels count for very much more.

    So it is in the scripts that compare velocities (Flux). Those that compare x_0 (Stable Diffusion 3, by default)
    have with the same name what is here `uniform`. Another schedule's levels count as the flow's level of the same SNR.
    """

    least: float = 0.001
    """Below this level the weight grows no more; 0.001 is the first level of the scripts, where it is 10⁶."""

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise ValueError(f"least must lie in (0, 1], got {self.least}")

    def x_0_weight(self, alpha: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
        s = flow_share(alpha, sigma)
        return s.clamp(min=self.least) ** -2 / s**2  # an error in the velocity is 1 / s times one in x_0


SPEC: type[Weighting] = SigmaSqrt
