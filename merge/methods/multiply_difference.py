"""Multiply difference: the geometric mean of what two models have learned since a common base."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods.base import Elementwise, Extent, Memory, Space
from merge.methods.geometric import MAGNITUDE, magnitude
from merge.methods.lerp import interpolate
from merge.scratch import scratch


@dataclass(frozen=True, kw_only=True)
class MultiplyDifference(Elementwise):
    """|a|^(1 - alpha) |b|^alpha with the sign of (1 - beta) a + beta b: meh's `multiply_difference`, on differences.

    Where only one model has learned something, nothing comes of it. Where a and b balance each other so that there is
    no sign, the result is 0 (meh: positive, whichever way they point). alpha = beta = 0 is a and alpha = beta = 1 is b,
    bit for bit.
    """

    alpha: Number = 0.5
    """The share of b in the size, from 0 to 1; 0^0 is 1, so at the ends the other difference does not count."""
    beta: Number = 0.5
    """The share of b in the sign; any number."""

    takes = (Space.DELTA, Space.DELTA)
    gives = Space.DELTA

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha)

    def unchanged(self) -> int | None:
        return {(0.0, 0.0): 0, (1.0, 1.0): 1}.get((fixed(self.alpha), fixed(self.beta)))

    def memory(self, of: Extent) -> Memory:
        return Memory((of.size + MAGNITUDE) * of.run)

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        a, b = inputs
        if (same := self.unchanged()) is not None:
            out.copy_(inputs[same])
            return
        with scratch(out) as (sizes,):
            magnitude(a, b, fixed(self.alpha), sizes)
            interpolate(a, b, fixed(self.beta), out)
            torch.sign(out, out=out).mul_(sizes)


SPEC: type[Elementwise] = MultiplyDifference
