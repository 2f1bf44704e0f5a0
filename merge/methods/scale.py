"""Everything times a number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods.base import Elementwise, Space


@dataclass(frozen=True, kw_only=True)
class Scale(Elementwise):
    """factor * a: of a difference its strength, of a model rarely what is meant.

    supermerger's `self` mode scales a model but for normalisations and the layers that lead out of a block; here
    those are named: `factor = { default = 1.02, names = [["*norm*", 1], ["*to_out*", 1], ["*proj_out*", 1]] }`.
    mergekit's `passthrough` with a `scale` is this method.
    """

    factor: Number = 1.0
    """Any number; 1 changes nothing, 0 gives zeros whatever a holds."""

    takes = (Space.EITHER,)
    gives = Space.EITHER
    temporaries = 0

    def unchanged(self) -> int | None:
        return 0 if fixed(self.factor) == 1 else None

    def spreads(self) -> bool:
        return fixed(self.factor) != 0

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        factor = fixed(self.factor)
        if factor == 0:
            out.zero_()
        else:
            torch.mul(inputs[0], factor, out=out)


SPEC: type[Elementwise] = Scale
