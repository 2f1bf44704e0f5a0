"""Another distribution's noise levels, moved towards more noise (Esser et al. 2024, arXiv:2403.03206, section 5.3.2).

Larger pictures need more noise until nothing is left to see, since many pixels say the same.
"""

from dataclasses import dataclass, field

from torch import Tensor

from tuner.diffusion.timesteps.base import AnyTimesteps, Timesteps
from tuner.diffusion.timesteps.logit_normal import LogitNormal


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """s t / (1 + (s - 1) t) instead of t: on a straight line, noise against signal grows s-fold at each quantile.

    `LogitNormal` shifted by 3 is what Stable Diffusion 3 trains with.
    """

    shift: float = 3.0
    """s: 1 changes nothing, more is more noise."""
    of: AnyTimesteps = field(default_factory=LogitNormal)
    """The distribution that is shifted."""

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}")

    def quantile(self, u: Tensor, size: tuple[int, int]) -> Tensor:
        return shifted(self.of.quantile(u, size), self.shift)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Shares of the schedule's time in [0, 1], moved."""
    return shift * t / (1 + (shift - 1) * t)


SPEC: type[Timesteps] = Shifted
