"""Every time alike (Ho et al. 2020, arXiv:2006.11239)."""

from dataclasses import dataclass

from torch import Tensor

from tuner.diffusion.timesteps.base import Timesteps


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Each time of a range is drawn equally often."""

    start: float = 0.0
    """The first time, as a share of the schedule: 0 is the least noise."""
    end: float = 1.0
    """Where the range ends, as a share of the schedule: 1 is the most noise."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"0 <= start < end <= 1 must hold, got start = {self.start}, end = {self.end}")

    def quantile(self, u: Tensor, size: tuple[int, int]) -> Tensor:
        return self.start + (self.end - self.start) * u


SPEC: type[Timesteps] = Uniform
