"""Trimming: the smallest numbers of a difference are noise, and are left out."""

from dataclasses import dataclass

from merge.coefficients import Number, fixed
from merge.methods._consensus import SparseSum
from merge.methods._numbers import check_range
from merge.methods._sparsify import Sparsify, trim, trimming
from merge.methods.base import Extent, Memory, MergeMethod, Tensors


@dataclass(frozen=True, kw_only=True)
class Magnitude(SparseSum):
    """scale * sum_i w_i trim(d_i): of each d_i the largest numbers by magnitude are kept, k = density * n of n.

    It is the first half of TIES (Yadav et al. 2023, arXiv:2306.01708), tensor by tensor (see `ties`). k is rounded
    down, but is at least 1 unless density is 0, so that tensors of one number stay (as in mergekit 0.1.5; PEFT drops
    them). Exactly k are kept: of equal numbers those that come first (sd-mecha keeps all that equal the smallest one
    kept). PEFT calls it `magnitude_prune`.
    """

    density: Number = 0.5
    """The part that is kept, from 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("density", self.density)

    def sparsify(self, tensors: Tensors) -> Sparsify:
        return trim(tensors, fixed(self.density))

    def thinning(self, of: Extent) -> tuple[Memory, Memory]:
        return trimming(of, fixed(self.density))


SPEC: type[MergeMethod] = Magnitude
