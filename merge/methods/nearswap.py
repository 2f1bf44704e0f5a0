"""Nearswap: a model takes over another's numbers where they are near its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods.base import Elementwise, Space
from merge.scratch import scratch


@dataclass(frozen=True, kw_only=True)
class Nearswap(Elementwise):
    """b where it lies within t of a, else a moved towards it by t: b clamped to [a - t, a + t].

    That is mergekit's `nearswap`, a + (b - a) min(t / |a - b|, 1), without the division. t = 0 is a, bit for bit; so is
    b where t reaches that far.
    """

    t: Number = 0.001
    """How far a number may move, 0 or more; in the units of the weights, which are about 0.01 to 0.1 in size."""

    takes = (Space.EITHER, Space.EITHER)
    gives = Space.EITHER
    temporaries = 2

    def __post_init__(self) -> None:
        check_range("t", self.t, high=inf)

    def unchanged(self) -> int | None:
        return 0 if fixed(self.t) == 0 else None

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        a, b = inputs
        if self.unchanged() == 0:
            out.copy_(a)
            return
        t = fixed(self.t)
        with scratch(out, 2) as (low, high):
            torch.clamp(b, min=torch.sub(a, t, out=low), max=torch.add(a, t, out=high), out=out)


SPEC: type[Elementwise] = Nearswap
