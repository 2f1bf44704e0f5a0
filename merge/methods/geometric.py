"""The weighted geometric mean of two models, number by number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods.base import Elementwise, Space


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

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        a, b = inputs
        if (same := self.unchanged()) is not None:
            out.copy_(inputs[same])
            return
        signs = torch.sign(a)
        signs.masked_fill_(signs != torch.sign(b), 0)
        torch.mul(magnitude(a, b, fixed(self.t)), signs, out=out)


def magnitude(a: Tensor, b: Tensor, t: float) -> Tensor:
    """|a|^(1 - t) |b|^t, where 0^0 = 1.

    By logarithms, of float64. (torch's `pow` gives other bits in the last few numbers of a run than in the others, and
    results would depend on how tensors are cut.)
    """
    if t in (0, 1):
        return (b if t else a).abs()
    logarithm = a.abs().double().log_().mul_(1 - t).add_(b.abs().double().log_(), alpha=t)
    return logarithm.exp_().to(a.dtype)


SPEC: type[Elementwise] = Geometric
