"""What two fine-tunes of one base have in common, or what each has alone (supermerger's feature extraction)."""

from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np

from merge.coefficients import Number, fixed
from merge.methods._combination import combine, combining
from merge.methods._gram import gram
from merge.methods._numbers import check_range
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors


@dataclass(frozen=True, kw_only=True)
class Extract(Fitted):
    """[(1 - alpha) a + alpha b] * [(1 - beta) d + beta (1 - d)], d = ((cos + 1) / 2)^gamma.

    a and b are differences to one base, and cos is that of the angle between them, row by row. With beta = 0 rows
    count by how much a and b agree, with beta = 1 by how much they do not.

    A row that is zero in a or b has cos = 0. d is 1 for gamma = 0.
    """

    alpha: Number = 0.5
    """In [0, 1]: from a to b."""
    beta: Number = 0.0
    """In [0, 1]: from what is alike to what is not."""
    gamma: Number = 1.0
    """0 or more: how strictly the likeness is judged."""
    per: Literal["rows", "last", "tensor"] = "rows"
    """What has an angle of its own: each of the `rows`, a filter; the `tensor`; or what the `last` dimension runs over
    (supermerger: the same in a matrix, but the three pixels of a line in a convolution's kernel)."""

    takes = (Space.DELTA, Space.DELTA)
    gives = Space.DELTA

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha)
        check_range("beta", self.beta)
        check_range("gamma", self.gamma, high=inf)

    def memory(self, of: Extent) -> Memory:
        return combining(of, self.per)

    def fit(self, tensors: Tensors) -> Merge:
        found = gram(tensors, self.per)
        alpha, beta, gamma = fixed(self.alpha), fixed(self.beta), fixed(self.gamma)
        alike = ((found.cosine(0, 1) + 1) / 2) ** gamma
        factor = (1 - beta) * alike + beta * (1 - alike)
        return combine(np.stack([(1 - alpha) * factor, alpha * factor]), found)


SPEC: type[MergeMethod] = Extract
