"""A difference added to a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods.base import Elementwise, Space


@dataclass(frozen=True, kw_only=True)
class Add(Elementwise):
    """a + weight * d.

    With d = b - c it is `add difference` (sd-mecha's is this method). A weight of 0 is a, bit for bit.
    """

    weight: Number = 1.0
    """How much of the difference; any number, a negative one takes it away."""

    takes = (Space.WEIGHT, Space.DELTA)
    gives = Space.WEIGHT
    temporaries = 0

    def unchanged(self) -> int | None:
        return 0 if fixed(self.weight) == 0 else None

    def spreads(self) -> bool:
        return fixed(self.weight) != 0

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        add(inputs[0], inputs[1], fixed(self.weight), out)


def add(a: Tensor, difference: Tensor, weight: float, out: Tensor) -> None:
    """Write a + weight * difference, which is a where the weight is 0 whatever the difference holds."""
    if weight == 0:
        out.copy_(a)
    else:
        torch.add(a, difference, alpha=weight, out=out)


SPEC: type[Elementwise] = Add
