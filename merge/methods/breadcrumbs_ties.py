"""Model Breadcrumbs, and then the consensus of TIES (arXiv:2312.06795, arXiv:2306.01708), as mergekit has it."""

from dataclasses import dataclass

from merge.coefficients import Number, fixed
from merge.methods._consensus import SignConsensus
from merge.methods._numbers import check_range
from merge.methods._sparsify import Sparsify, middle, trimming
from merge.methods.base import Extent, Memory, MergeMethod, Tensors


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(SignConsensus):
    """scale * sum_{i in A} w_i t_i / sum_{i in A} |w_i|, where t_i = s(d_i) are what `breadcrumbs` adds up.

    A are the inputs of the elected sign, as in `ties`. mergekit does not divide here: divide = "none", draw =
    "positive".
    """

    density: Number = 0.9
    """The part that is kept, from 0 to 1."""
    gamma: Number = 0.01
    """The part that is left out at the top, from 0 to 1."""

    def __post_init__(self) -> None:
        check_range("density", self.density)
        check_range("gamma", self.gamma)

    def sparsify(self, tensors: Tensors) -> Sparsify:
        return middle(tensors, fixed(self.density), fixed(self.gamma))

    def thinning(self, of: Extent) -> tuple[Memory, Memory]:
        return trimming(of, fixed(self.density), fixed(self.gamma))


SPEC: type[MergeMethod] = BreadcrumbsTies
