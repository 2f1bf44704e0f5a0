"""Euclidean add difference: what two models have learned, combined in the root of the squares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods._totals import summed
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors
from merge.methods.lerp import interpolate
from merge.scratch import scratch


@dataclass(frozen=True, kw_only=True)
class EuclideanAddDifference(Fitted):
    """sign(m) d |m| / |d|, m = (1 - alpha) a + alpha b, d² = (1 - alpha) a² / |a|² + alpha b² / |b|².

    meh's `euclidean_add_difference`, on differences; |a| is the norm of a whole tensor. It is as long as the weighted
    sum m, but where one model has learned much and the other nothing, it keeps more of it. The sign of a number of m
    that is 0 is 0 (meh: positive). A difference that is zero everywhere counts nothing in d, and where m is zero
    everywhere so is the result (NaN in meh). alpha = 0 is a and alpha = 1 is b, bit for bit.
    """

    alpha: Number = 0.5
    """The share of b, from 0 to 1."""

    takes = (Space.DELTA, Space.DELTA)
    gives = Space.DELTA

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha)

    def unchanged(self) -> int | None:
        return {0.0: 0, 1.0: 1}.get(fixed(self.alpha))

    def memory(self, of: Extent) -> Memory:
        return Memory(max(2 * of.size, 4 * 8 + 1) * of.run)

    def fit(self, tensors: Tensors) -> Merge:
        alpha, same = fixed(self.alpha), self.unchanged()
        (scale_a, scale_b), gain = ((0.0, 0.0), 0.0) if same is not None else _scales(tensors, alpha)

        def merge(inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
            a, b = inputs
            if same is not None:
                out.copy_(inputs[same])
                return
            with scratch(out, 2) as (squares, other):
                torch.mul(a, scale_a, out=squares).square_().add_(torch.mul(b, scale_b, out=other).square_())
                interpolate(a, b, alpha, out)
                torch.sign(out, out=out).mul_(squares.sqrt_().mul_(gain))

        return merge


def _scales(tensors: Tensors, alpha: float) -> tuple[tuple[float, float], float]:
    """What a and b are multiplied by before they are squared, and what the root of the sum is multiplied by after.

    These are sqrt((1 - alpha) n) / (|a| |d|), sqrt(alpha n) / (|b| |d|) and |m| / sqrt(n), of n numbers: between them
    numbers are about 1, so that no square vanishes.
    """
    length, squares, signed = 0.0, [0.0, 0.0], [0.0, 0.0]
    for _, run in tensors.chunks():
        with scratch(run[0], 4, torch.float64) as (a, b, mean, square), scratch(run[0], 1, torch.bool) as (unsigned,):
            torch.lerp(a.copy_(run[0]), b.copy_(run[1]), alpha, out=mean)
            length += summed(torch.square(mean, out=square))
            for index, tensor in enumerate((a, b)):
                squares[index] += summed(torch.square(tensor, out=square))
                torch.square(tensor, out=square).masked_fill_(torch.eq(mean, 0, out=unsigned), 0)
                signed[index] += summed(square)  # only what has a sign is in d
    shares = [share / square if square else 0.0 for share, square in zip((1 - alpha, alpha), squares, strict=True)]
    distance = shares[0] * signed[0] + shares[1] * signed[1]
    if distance == 0:
        return (0.0, 0.0), 0.0
    unit = tensors.elements / distance
    return (math.sqrt(shares[0] * unit), math.sqrt(shares[1] * unit)), math.sqrt(length / tensors.elements)


SPEC: type[MergeMethod] = EuclideanAddDifference
