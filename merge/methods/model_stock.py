"""Model Stock (Jang et al. 2024, arXiv:2403.19522): how far to trust the mean of a few fine-tunes."""

from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

import numpy as np

from merge.methods._combination import combine, combining
from merge.methods._gram import gram
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors


@dataclass(frozen=True, kw_only=True)
class ModelStock(Fitted):
    """t * mean_i D_i, with t = N cos / (1 + (N - 1) cos): N differences to one base at an angle to each other.

    Fine-tunes are a common centre plus noise that points anywhere. The cosine between two of them tells how much of
    their squared length is the centre's, and t times the mean is the point nearest to it of those between base and
    mean. Differences that agree give t = 1; orthogonal ones have no common centre, and give 0.

    A negative cosine, which no such centre would give, counts as 0 (the peers go past the base then). A
    difference that is zero is orthogonal to all.
    """

    cosine: Literal["pairs", "neighbours"] = "pairs"
    """The mean over all `pairs` (the paper, mergekit), or over `neighbours` in the order given (as in sd-mecha, whose
    result depends on that order)."""
    per: Literal["tensor", "rows"] = "tensor"
    """What has a t of its own: the `tensor` (the paper), or each of its `rows`: filters. sd-mecha takes what the last
    dimension runs over, in a convolution the three pixels of a kernel's line."""

    takes = (Space.DELTA, Space.DELTA)
    repeats = True
    gives = Space.DELTA

    def memory(self, of: Extent) -> Memory:
        return combining(of, self.per)

    def fit(self, tensors: Tensors) -> Merge:
        found, count = gram(tensors, self.per), tensors.inputs
        pairs = combinations(range(count), 2) if self.cosine == "pairs" else pairwise(range(count))
        cosine = np.mean([found.cosine(i, j) for i, j in pairs], axis=0).clip(0)
        t = count * cosine / (1 + (count - 1) * cosine)
        return combine(np.tile(t / count, (count, 1)), found)


SPEC: type[MergeMethod] = ModelStock
