"""Train difference: a model added to another as if it had been trained from there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods.base import Elementwise, Space
from merge.scratch import scratch

GAIN = 1.8
"""supermerger's constant. The fraction is 1/2 where a is as far from b as c is, so a weight of 1 adds 0.9 (b - c)."""


@dataclass(frozen=True, kw_only=True)
class TrainDifference(Elementwise):
    """a + 1.8 weight (b - c) |b - a| / (|b - c| + |b - a|): supermerger's `trainDifference`.

    Where a is at b already nothing is added; where it is far from both b and c, almost twice the difference. Where a, b
    and c are the same number, it stays. A weight of 0 is a, bit for bit.
    """

    weight: Number = 1.0
    """How much of the difference (supermerger's alpha, 0 to 1.5); any number."""

    takes = (Space.WEIGHT, Space.WEIGHT, Space.WEIGHT)
    gives = Space.WEIGHT
    temporaries = 2.25

    def unchanged(self) -> int | None:
        return 0 if fixed(self.weight) == 0 else None

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        a, b, c = inputs
        if self.unchanged() == 0:
            out.copy_(a)
            return
        with scratch(out, 2) as (learned, distance), scratch(out, dtype=torch.bool) as (equal,):
            torch.sub(b, c, out=learned)
            torch.sub(b, a, out=distance).abs_()
            torch.abs(learned, out=out).add_(distance)
            torch.eq(out, 0, out=equal)
            distance.div_(out.masked_fill_(equal, 1))  # where it is 0, so is what was learned
            torch.add(a, learned.mul_(distance), alpha=GAIN * fixed(self.weight), out=out)


SPEC: type[Elementwise] = TrainDifference
