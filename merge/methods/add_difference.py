"""Add difference: what one model has learned since another, added to a third."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods.add import add
from merge.methods.base import Elementwise, Space


@dataclass(frozen=True, kw_only=True)
class AddDifference(Elementwise):
    """a + weight * (b - c): `add difference` in AUTOMATIC1111, supermerger and meh.

    A weight of 0 is a, bit for bit. diffusers' community merger takes 1 - alpha for the weight; supermerger rounds
    b - c to the file's dtype before it is added. sd-mecha's `add_difference` may clamp the result between a and b:
    here that is the method `clamp`.
    """

    weight: Number = 1.0
    """How much of the difference; any number, 0 to 2 in most tools."""

    takes = (Space.WEIGHT, Space.WEIGHT, Space.WEIGHT)
    gives = Space.WEIGHT
    temporaries = 0

    def unchanged(self) -> int | None:
        return 0 if fixed(self.weight) == 0 else None

    def spreads(self) -> bool:
        return fixed(self.weight) != 0

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        a, b, c = inputs
        torch.sub(b, c, out=out)
        add(a, out, fixed(self.weight), out)


SPEC: type[Elementwise] = AddDifference
