"""SCE: select, calculate, erase (Wan et al. 2024, "FuseChat", arXiv:2408.07990)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Literal

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._consensus import agree
from merge.methods._numbers import check_range, part
from merge.methods._select import ALL, Largest, Numbers, largest
from merge.methods._totals import total
from merge.methods.base import Fitted, Merge, MergeMethod, Space, Tensors


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

    def fit(self, tensors: Tensors) -> Merge:
        chosen, scale = self._chosen(tensors), fixed(self.scale)

        def selected(inputs: Sequence[Tensor], start: int) -> list[Tensor]:
            if chosen == ALL:
                return list(inputs)
            spread = variance(inputs)
            mask = chosen.mask(spread, start).logical_and_(spread > 0)
            return [torch.where(mask, values, 0) for values in inputs]

        squares = [list[float]() for _ in range(tensors.inputs)]
        for start, run in tensors.chunks():
            for found, values in zip(squares, selected(run, start), strict=True):
                found.append(total(values.double().square()))
        sums = [fsum(found) for found in squares]
        weights = [one / (fsum(sums) or 1.0) for one in sums]  # the squares may be too small for float32

        def merge(inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
            agree(selected(inputs, start), weights, out, "sum", "zero", "weights")
            out.mul_(scale)

        return merge

    def _chosen(self, tensors: Tensors) -> Largest:
        """The numbers with the largest variances."""
        share = fixed(self.select)
        if share >= 1:
            return ALL

        variances = Numbers(tensors, lambda run: [variance(run)])
        candidates = tensors.elements
        if self.of == "varying":
            candidates = sum(int(run[0].count_nonzero()) for _, run in variances.chunks())
        count = part(share, candidates)
        return largest(variances, [{count}])[0][count]


def variance(inputs: Sequence[Tensor]) -> Tensor:
    """The variance over the inputs at each place, times their number; exactly 0 where they are equal."""
    shifted = [values - inputs[0] for values in inputs]
    mean = torch.zeros_like(inputs[0])
    for values in shifted:
        mean += values
    mean /= len(inputs)
    found = torch.zeros_like(mean)
    for values in shifted:
        found += values.sub_(mean).square_()
    return found


SPEC: type[MergeMethod] = Sce
