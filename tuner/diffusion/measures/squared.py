"""The squared error."""

from dataclasses import dataclass

from torch import Tensor

from tuner.diffusion.measures.base import Level, Measure


@dataclass(frozen=True, kw_only=True)
class Squared:
    """d², whose best answer is the mean of what may be there (Ho et al. 2020, arXiv:2006.11239)."""

    def of(self, difference: Tensor, level: Level) -> Tensor:
        return difference.square()


SPEC: type[Measure] = Squared
