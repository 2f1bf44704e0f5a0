"""How large an error of the network's output is."""

from dataclasses import dataclass
from typing import Annotated, Protocol

from torch import Tensor

from tuner.plugins import Folder


@dataclass(frozen=True)
class Level:
    """The noise levels of a batch, each `[B, 1, 1, 1]` float32."""

    share: Tensor
    """Of the schedule's time, in [0, 1]."""
    alpha: Tensor
    sigma: Tensor


class Measure(Protocol):
    """A function of the difference between output and target, for each element by itself."""

    def of(self, difference: Tensor, level: Level) -> Tensor:
        """How much a `difference`, `[B, C, h, w]`, counts: 0 for none, else more."""
        ...


AnyMeasure = Annotated[Measure, Folder("tuner.diffusion.measures")]
