"""Similarity add difference: models are averaged where they agree, and their difference is added where they do not."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods.base import Elementwise, Space
from merge.scratch import scratch


@dataclass(frozen=True, kw_only=True)
class SimilarityAddDifference(Elementwise):
    """(1 - s) (a + alpha (b - c)) + s ((1 - alpha/2) a + alpha/2 b), s = beta (ab / max(|a|, |b|)² + 1) / 2.

    meh's method. s is beta where a = b, and 0 where a = -b. Two zeros are equal (0 / 0 counts as 1, as in meh). It is
    worked out as a + alpha ((1 - s) (b - c) + s (b - a) / 2), and ab / max² as the smaller over the larger, which
    cannot underflow. alpha = 0 is a, bit for bit. Chattiori's version goes on to give the result a's mean and standard
    deviation.
    """

    alpha: Number = 0.5
    """How much of b; any number, 0 to 1 in most tools."""
    beta: Number = 1.0
    """How much similarity counts: 0 is `add_difference`; from 0 to 1."""

    takes = (Space.WEIGHT, Space.WEIGHT, Space.WEIGHT)
    gives = Space.WEIGHT
    temporaries = 3.5

    def __post_init__(self) -> None:
        check_range("beta", self.beta)

    def unchanged(self) -> int | None:
        return 0 if fixed(self.alpha) == 0 else None

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        a, b, c = inputs
        if self.unchanged() == 0:
            out.copy_(a)
            return
        with scratch(out, 3) as (ratio, one, other), scratch(out, 2, torch.bool) as (mask, zero):
            torch.lt(torch.abs(a, out=one), torch.abs(b, out=other), out=mask)
            torch.where(mask, torch.div(a, b, out=one), torch.div(b, a, out=other), out=ratio)
            torch.logical_and(torch.eq(a, 0, out=mask), torch.eq(b, 0, out=zero), out=mask)
            ratio.masked_fill_(mask, 1)
            similarity = ratio.add_(1).mul_(fixed(self.beta) / 2)
            torch.sub(b, c, out=out)
            out.lerp_(torch.sub(b, a, out=one).mul_(0.5), similarity)
            torch.add(a, out, alpha=fixed(self.alpha), out=out)


SPEC: type[Elementwise] = SimilarityAddDifference
