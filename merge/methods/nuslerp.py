"""Slerp by two weights, along the whole tensor or along each of its rows or columns (NuSLERP of mergekit)."""

from dataclasses import dataclass
from typing import Literal

from merge.coefficients import Number
from merge.methods._combination import check_shares, combine, combining, only, shares
from merge.methods._gram import gram
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors
from merge.methods.slerp import Lengths, arc


@dataclass(frozen=True, kw_only=True)
class NuSlerp(Fitted):
    """`slerp` at t = w_1 / (w_0 + w_1), each vector at its own angle; on differences to a base, or on weights.

    A vector that is zero in an input, or opposite in the two, is lerped. mergekit keeps lengths `free`, and its rows
    of a convolution are the three pixels of a kernel's line: here a row is a whole filter.
    """

    weights: tuple[Number, ...] = ()
    """Two of them, 0 or more; none: equal ones."""
    lengths: Lengths = "between"
    """As in `slerp`: `between` the inputs' lengths, or `free`."""
    per: Literal["tensor", "rows", "columns"] = "tensor"
    """What has an angle of its own: the `tensor`, each of its `rows` (first dimension: outputs), or `columns` (the
    other dimensions: inputs)."""

    takes = (Space.EITHER, Space.EITHER)
    gives = Space.EITHER

    def __post_init__(self) -> None:
        check_shares(self.weights)

    def unchanged(self) -> int | None:
        return only(self.weights)

    def memory(self, of: Extent) -> Memory:
        return combining(of, self.per)

    def fit(self, tensors: Tensors) -> Merge:
        found = gram(tensors, self.per)
        _, t = shares(self.weights, 2)
        return combine(arc(found, t, self.lengths), found)


SPEC: type[MergeMethod] = NuSlerp
