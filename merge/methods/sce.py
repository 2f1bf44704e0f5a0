"""SCE: select, calculate, erase (Wan et al. 2024, "FuseChat", arXiv:2408.07990)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Literal

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._consensus import agree, agreeing
from merge.methods._numbers import check_range, part
from merge.methods._select import ALL, PATTERNS, Largest, Numbers, largest, selecting
from merge.methods._totals import total
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors
from merge.scratch import scratch


@dataclass(frozen=True, kw_only=True)
class Sce(Fitted):
    """scale * sum_{i in A} w_i s d_i / sum_{i in A} w_i, with weights w_i = |s d_i|^2 / sum_j |s d_j|^2.

    Select: s is 1 where the variance over the inputs is among the largest of the tensor, else 0. Calculate: each input
    gets one weight for the whole tensor, from its selected numbers. Erase: A are the inputs whose sign is that of
    sum_i s d_i.

    Where the inputs are equal their variance is 0, and nothing is selected unless select = 1: what all of them agree
    about is left out. Inputs that are zero have no weight, and if all of them are the result is zero. (mergekit takes
    equal weights where the mean squares add up to less than 1e-6, as they do for most fine-tunes.)
    """

    select: Number = 0.1
    """The part that is selected, from 0 to 1; 1 selects all without looking at the variance. The paper's tau."""
    of: Literal["all", "varying"] = "all"
    """What it is a part of: all numbers of the tensor, as in the paper, or those whose variance is not 0, as in
    mergekit."""
    scale: Number = 1.0
    """For the result."""

    takes = (Space.DELTA,)
    repeats = True
    gives = Space.DELTA

    def __post_init__(self) -> None:
        check_range("select", self.select)

    def memory(self, of: Extent) -> Memory:
        varying = (of.inputs + 2) * of.size * of.run
        merging = of.inputs * of.size * of.run + max(agreeing(of), varying, 8 * of.run)
        chosen = selecting(of, 1, [fixed(self.select)])
        masks = (2 + of.size) * of.run  # of booleans, and one as the numbers that it is multiplied as
        return Memory(max(merging, varying + chosen.lent), max(chosen.asked, masks))

    def fit(self, tensors: Tensors) -> Merge:
        chosen, scale = self._chosen(tensors), fixed(self.scale)

        def select(inputs: Sequence[Tensor], start: int, out: Sequence[Tensor]) -> None:
            with scratch(inputs[0]) as (spread,):
                variance(inputs, spread)
                mask = chosen.mask(spread, start).logical_and_(spread > 0)
            for values, left in zip(inputs, out, strict=True):
                bits = PATTERNS[values.dtype]
                torch.mul(values.view(bits), mask, out=left.view(bits))  # patterns, times 0 or 1

        squares = [list[float]() for _ in range(tensors.inputs)]
        for start, run in tensors.chunks():
            with scratch(run[0], tensors.inputs) as left:
                selected: Sequence[Tensor] = run
                if chosen != ALL:
                    select(run, start, left)
                    selected = left
                for found, values in zip(squares, selected, strict=True):
                    found.append(total(values, squared=True))
        sums = [fsum(found) for found in squares]
        weights = [one / (fsum(sums) or 1.0) for one in sums]  # the squares may be too small for float32

        def merge(inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
            with scratch(out, len(inputs)) as left:
                selected: Sequence[Tensor] = inputs
                if chosen != ALL:
                    select(inputs, start, left)
                    selected = left
                agree(selected, weights, out, "sum", "zero", "weights")
            out.mul_(scale)

        return merge

    def _chosen(self, tensors: Tensors) -> Largest:
        """The numbers with the largest variances."""
        share = fixed(self.select)
        if share >= 1:
            return ALL

        variances = Numbers(tensors, 1, lambda run, made: variance(run, made[0]))
        candidates = tensors.elements
        if self.of == "varying":
            candidates = sum(int(run[0].count_nonzero()) for _, run in variances.chunks())
        count = part(share, candidates)
        return largest(variances, [{count}])[0][count]


def variance(inputs: Sequence[Tensor], out: Tensor) -> None:
    """Write the variance over the inputs at each place, times their number; exactly 0 where they are equal."""
    with scratch(out, len(inputs) + 1) as (mean, *shifted):
        mean.zero_()
        for values, difference in zip(inputs, shifted, strict=True):
            mean += torch.sub(values, inputs[0], out=difference)
        mean /= len(inputs)
        out.zero_()
        for difference in shifted:
            out += difference.sub_(mean).square_()


SPEC: type[MergeMethod] = Sce
