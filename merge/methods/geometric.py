"""The weighted geometric mean of two models, number by number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods.base import Elementwise, Extent, Memory, Space
from merge.scratch import scratch

MAGNITUDE = 16
"""Bytes that `magnitude` takes for each number: two of float64."""


@dataclass(frozen=True, kw_only=True)
class Geometric(Elementwise):
    """|a|^(1 - t) |b|^t with the sign of both; 0 where their signs differ, or one of them is 0.

    There is no real mean of numbers of opposite signs; 0 is what both sides tend to as one of them goes through 0, and
    at t = 1/2 the real part of the complex one, which is sd-mecha's answer. At other t that answer is no mean at all:
    -1 and 1 give cos(pi (1 - t)). Chattiori's is NaN there. t = 0 is a and t = 1 is b, bit for bit.
    """

    t: Number = 0.5
    """The share of b, from 0 to 1."""

    takes = (Space.EITHER, Space.EITHER)
    gives = Space.EITHER

    def __post_init__(self) -> None:
        check_range("t", self.t)

    def unchanged(self) -> int | None:
        return {0.0: 0, 1.0: 1}.get(fixed(self.t))

    def memory(self, of: Extent) -> Memory:
        return Memory((of.size + MAGNITUDE + 1) * of.run)

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        a, b = inputs
        if (same := self.unchanged()) is not None:
            out.copy_(inputs[same])
            return
        with scratch(out) as (signs,), scratch(out, dtype=torch.bool) as (unlike,):
            torch.ne(torch.sign(a, out=signs), torch.sign(b, out=out), out=unlike)
            signs.masked_fill_(unlike, 0)
            magnitude(a, b, fixed(self.t), out)
            out.mul_(signs)


def magnitude(a: Tensor, b: Tensor, t: float, out: Tensor) -> None:
    """Write |a|^(1 - t) |b|^t, where 0^0 = 1.

    By logarithms, of float64. (torch's `pow` gives other bits in the last few numbers of a run than in the others, and
    results would depend on how tensors are cut.)
    """
    if t in (0, 1):
        torch.abs(b if t else a, out=out)
        return
    with scratch(out, 2, torch.float64) as (logarithm, other):
        other.copy_(b).abs_().log_()
        logarithm.copy_(a).abs_().log_().mul_(1 - t).add_(other, alpha=t)
        out.copy_(logarithm.exp_())


SPEC: type[Elementwise] = Geometric
