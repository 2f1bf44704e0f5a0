"""The difference of two models: what the first has that the second has not."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.methods.base import Elementwise, Space


@dataclass(frozen=True, kw_only=True)
class Subtract(Elementwise):
    """a - b: a `task vector` where a was trained from b."""

    takes = (Space.WEIGHT, Space.WEIGHT)
    gives = Space.DELTA
    temporaries = 0

    def spreads(self) -> bool:
        return True

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        torch.sub(inputs[0], inputs[1], out=out)


SPEC: type[Elementwise] = Subtract
