"""Arcee Fusion: take over from the second model only what matters much more than the rest (as mergekit has it)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods._rows import by_rows, rows, width
from merge.methods._select import counting, quantiles
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors
from merge.scratch import scratch


@dataclass(frozen=True, kw_only=True)
class ArceeFusion(Fitted):
    """b where its importance is greater than q_2 + fence (q_3 - q_1), else a; q are the quartiles of the importance.

    The importance of a number is |b - a| KL(softmax(b's row) || softmax(a's row)). A row is what one output is made of:
    all dimensions but the first. A vector, and a tensor whose rows have one number each, is one row.

    A row that was only shifted does not count, for its softmax is the same; a tensor of one number stays a's; and where
    the importance is the same everywhere nothing is taken over.

    mergekit has no paper for it, and differs. Its softmax runs over the last dimension: kernels are compared by lines
    of 3 pixels, and 1x1 convolutions and scalars, whose importance is 0, are taken over wholly. Its quartiles are those
    of a random sample where there are more than a million numbers. And importances that equal the threshold count. For
    smaller matrices the two agree.
    """

    fence: Number = 1.5
    """How far beyond the median an outlier lies, in distances of the quartiles; 0 or more. mergekit's is 1.5."""

    takes = (Space.WEIGHT, Space.WEIGHT)
    gives = Space.WEIGHT

    def __post_init__(self) -> None:
        check_range("fence", self.fence, 0, inf)

    def memory(self, of: Extent) -> Memory:
        joined, together = by_rows(of)
        return Memory(max((8 + 2 * of.size) * of.run, joined), max(5 * 8 * together, counting(of)))

    def fit(self, tensors: Tensors) -> Merge:
        wide = width(tensors.shape)
        shift = divergences(tensors)

        def importance(inputs: Sequence[Tensor], start: int, out: Tensor) -> None:
            a, b = inputs
            with scratch(a, dtype=torch.int64) as (row,), scratch(a) as (shifts,):
                torch.arange(start, start + a.numel(), out=row).floor_divide_(wide)
                torch.index_select(shift.to(a), 0, row, out=shifts)
                torch.sub(b, a, out=out).abs_().mul_(shifts)

        def importances() -> Iterator[tuple[int, list[Tensor]]]:
            for start, run in tensors.chunks():
                with scratch(run[0]) as (found,):
                    importance(run, start, found)
                    yield start, [found]

        threshold = 0.0
        if tensors.elements:
            first, second, third = quantiles(importances, tensors.elements, (0.25, 0.5, 0.75))
            threshold = second + fixed(self.fence) * (third - first)

        def merge(inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
            a, b = inputs
            with scratch(out) as (found,), scratch(out, dtype=torch.bool) as (taken,):
                importance(inputs, start, found)
                torch.where(torch.gt(found, threshold, out=taken), b, a, out=out)

        return merge


def divergences(tensors: Tensors) -> Tensor:
    """KL(softmax(b) || softmax(a)) for each row, relative to the largest: only quotients of importances matter."""
    found: list[Tensor] = []
    for _, (a, b) in rows(tensors):
        p, q = b.double().log_softmax(1), a.double().log_softmax(1)
        found.append((p.exp() * (p - q)).sum(1).clamp_(min=0))
    together = torch.cat(found) if found else torch.zeros(0)
    return together / together.max() if together.any() else together


SPEC: type[MergeMethod] = ArceeFusion
