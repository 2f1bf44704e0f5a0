"""Model Breadcrumbs: leave out the smallest and the largest numbers (Davari & Belilovsky 2023, arXiv:2312.06795)."""

from dataclasses import dataclass

from merge.coefficients import Number, fixed
from merge.methods._consensus import SparseSum
from merge.methods._numbers import check_range
from merge.methods._sparsify import Sparsify, middle, trimming
from merge.methods.base import Extent, Memory, MergeMethod, Tensors


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(SparseSum):
    """scale * sum_i w_i s(d_i): s leaves out the gamma n largest numbers by magnitude, and keeps the next density n.

    n is the number of numbers in the tensor, and both counts are rounded down; at least one number is kept unless
    density is 0. If gamma + density > 1 fewer of the largest are left out, so that the density is kept (as in
    mergekit). Of equal numbers those that come first count as larger. The paper's percentiles are beta = 1 - gamma -
    density and gamma' = 1 - gamma.
    """

    density: Number = 0.9
    """The part that is kept, from 0 to 1."""
    gamma: Number = 0.01
    """The part that is left out at the top, from 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("density", self.density)
        check_range("gamma", self.gamma)

    def sparsify(self, tensors: Tensors) -> Sparsify:
        return middle(tensors, fixed(self.density), fixed(self.gamma))

    def thinning(self, of: Extent) -> tuple[Memory, Memory]:
        return trimming(of, fixed(self.density), fixed(self.gamma))


SPEC: type[MergeMethod] = Breadcrumbs
