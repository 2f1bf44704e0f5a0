"""Top-k tensor sum: the first model's numbers, in the second one's order (as in meh and sd-mecha)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range, window
from merge.methods.base import Extent, MergeMethod, Space, Whole


@dataclass(frozen=True, kw_only=True)
class TopKTensorSum(Whole):
    """r where |r| is in the window, else a; r has a's numbers in the order of b's.

    Where b has its j-th smallest number, r has a's j-th smallest. The window holds the numbers of a from the place
    floor(offset n) to floor((offset + width) n) of n, sorted by magnitude; what goes beyond n begins again with the
    smallest. Exactly that many places are written. The result is no permutation of a: a number of the window may stand
    twice, at its old place and at its new one, or nowhere.

    Equal numbers count in the order in which they stand. The sources treat all that equal the window's first number
    alike (as outside in meh, as inside in sd-mecha), and round the bounds to the nearest.
    """

    width: Number = 0.5
    """How much of a is in the window, from 0 to 1."""
    offset: Number = 0.0
    """Where it begins, from 0 to 1: at 1 - width it holds the largest magnitudes."""

    takes = (Space.EITHER, Space.EITHER)
    gives = Space.EITHER

    def __post_init__(self) -> None:
        check_range("width", self.width)
        check_range("offset", self.offset)

    def unchanged(self) -> int | None:
        return 0 if fixed(self.width) == 0 else None

    def computing(self, of: Extent) -> float:
        return (25 + 2 * of.size) * of.elements

    def compute(self, tensors: Sequence[Tensor]) -> Tensor:
        a, b = (tensor.reshape(-1) for tensor in tensors)
        ordered = a.sort(stable=True).values
        by_size = ordered.abs().argsort(stable=True)
        inside = torch.zeros_like(a, dtype=torch.bool)
        for begin, end in window(fixed(self.width), fixed(self.offset), a.numel()):
            inside[by_size[begin:end]] = True
        places = b.argsort(stable=True)[inside]
        result = a.clone()
        result[places] = ordered[inside]
        return result.reshape(tensors[0].shape)


SPEC: type[MergeMethod] = TopKTensorSum
