"""Keeping a where two checkpoints point the same way and taking b where they do not (cosineA and cosineB)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from merge.coefficients import Number, fixed
from merge.methods._combination import combine, combining
from merge.methods._gram import Array, Gram, Vectors, gram
from merge.methods._numbers import check_range
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors


@dataclass(frozen=True, kw_only=True)
class Cosine(Fitted):
    """k a + (1 - k) b, k = clamp((s - low) / (high - low) - alpha, 0, 1), s a similarity of each column to its like.

    A column is what stands at one place of all dimensions but the first: what one input of a layer does. s is the
    mean of two cosines: of the column in a and in b, and of the whole tensor in a and in b (`overall`). Fine-tunes of
    one base have s near 1 everywhere; there alpha is about the share of b.

    supermerger, where this comes from, stretches s: its `low` and `high` are the smallest and largest s of the whole
    model (of the 1st to the 99th percentile in each tensor). A merge that sees one tensor at a time does not have them;
    give the model's here to get the same. sd-mecha does not stretch: `low` 0, `high` 1.

    A column that is zero in a or b has cosine 0. A vector is one column.
    """

    alpha: Number = 0.0
    """In [0, 1]: how much similarity is not enough. 1 gives b."""
    overall: Literal["columns", "tensor", "none"] = "columns"
    """The second cosine: of the `columns` scaled to one length, which is the mean of their cosines (supermerger's
    cosineA); of the `tensor` as it is (cosineB); or `none` (sd-mecha's cosine A)."""
    low: float = 0.0
    """The similarity that counts as 0; below `high`."""
    high: float = 1.0
    """The similarity that counts as 1."""

    takes = (Space.EITHER, Space.EITHER)
    gives = Space.EITHER

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha)
        if not self.low < self.high:
            raise ValueError(f"low: must be below high ({self.high}), got {self.low}")

    def unchanged(self) -> int | None:
        return 1 if (1 - self.low) / (self.high - self.low) <= fixed(self.alpha) else None

    def memory(self, of: Extent) -> Memory:
        return combining(of, "columns")

    def fit(self, tensors: Tensors) -> Merge:
        found = gram(tensors, "columns")
        share = (self.similarity(found) - self.low) / (self.high - self.low) - fixed(self.alpha)
        share = share.clip(0, 1)
        return combine(np.stack([share, 1 - share]), found)

    def similarity(self, gram: Gram) -> Array:
        """s of each column."""
        cosines = gram.cosine(0, 1)
        if self.overall == "none":
            return cosines
        if self.overall == "tensor":
            whole = Gram(Vectors.of((), "tensor"), gram.inputs.sum(2, keepdims=True), gram.differences[:, :, :1])
            return (cosines + whole.cosine(0, 1)) / 2
        used = np.sqrt(np.prod(np.count_nonzero(gram.norms, axis=1)))
        return (cosines + cosines.sum() / max(used, 1)) / 2


SPEC: type[MergeMethod] = Cosine
