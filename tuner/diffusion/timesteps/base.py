"""Which noise levels training draws."""

from typing import Annotated, Protocol

from torch import Tensor

from tuner.plugins import Folder


class Timesteps(Protocol):
    """A distribution over noise levels, by its quantiles: `quantile` of uniform numbers is distributed so."""

    def quantile(self, u: Tensor, size: tuple[int, int]) -> Tensor:
        """Shares of the schedule's time in [0, 1], 0 the least noise, at the quantiles `u` in [0, 1), float64 `[B]`.

        `size` is the latents' height and width, for a distribution that depends on it.
        """
        ...


AnyTimesteps = Annotated[Timesteps, Folder("tuner.diffusion.timesteps")]
