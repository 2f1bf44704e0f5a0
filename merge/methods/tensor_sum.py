"""Tensor sum: a slice of the second model's tensor in the first one's (as in supermerger)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range, window
from merge.methods.base import Fitted, Merge, MergeMethod, Space, Tensors


@dataclass(frozen=True, kw_only=True)
class TensorSum(Fitted):
    """b for the rows from floor(offset n) to floor((offset + width) n), of n in the first dimension, else a.

    What goes beyond n begins again at 0, and is rounded down as well. So it is in supermerger, whose alpha and beta are
    width and offset; sd-mecha rounds to the nearest row. A tensor without dimensions is one row: it is b's only if the
    width is 1. A slice may cut an attention head in two.
    """

    width: Number = 0.5
    """The part that is taken from b, from 0 to 1."""
    offset: Number = 0.0
    """Where it begins, from 0 to 1."""

    takes = (Space.EITHER, Space.EITHER)
    gives = Space.EITHER
    temporaries = 0

    def __post_init__(self) -> None:
        check_range("width", self.width)
        check_range("offset", self.offset)

    def unchanged(self) -> int | None:
        return {0.0: 0, 1.0: 1}.get(fixed(self.width))

    def fit(self, tensors: Tensors) -> Merge:
        count = tensors.shape[0] if tensors.shape else 1
        row = tensors.elements // max(count, 1)
        slices = [(begin * row, end * row) for begin, end in window(fixed(self.width), fixed(self.offset), count)]

        def merge(inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
            a, b = inputs
            out.copy_(a)
            for begin, end in slices:
                here = slice(max(0, begin - start), max(0, end - start))
                out[here] = b[here]

        return merge


SPEC: type[MergeMethod] = TensorSum
