"""DARE: drop most of a difference at random and rescale the rest (Yu et al. 2023, arXiv:2311.03099)."""

from dataclasses import dataclass

from merge.coefficients import Number, fixed
from merge.methods._consensus import SparseSum
from merge.methods._numbers import check_range
from merge.methods._sparsify import Rescale, Sparsify, drop, dropping
from merge.methods.base import Extent, Memory, MergeMethod, Tensors


@dataclass(frozen=True, kw_only=True)
class DareLinear(SparseSum):
    """scale * sum_i w_i m_i d_i / density, where m_i is 1 with the probability `density`, else 0.

    What is kept depends on the seed, the tensor's name, the input's place among the inputs and the number's place in
    the tensor, and on nothing else. `dare_ties` and `della` with the same seed keep the same; two steps of a recipe
    that are to be independent need two seeds. A tensor of one number is dropped with the probability 1 - density.
    """

    density: Number = 0.5
    """The part that is kept, from 0 to 1: the paper's 1 - p, which goes down to 0.1 and less."""
    rescale: Rescale = "inverse"
    """How kept numbers make up for dropped ones: by the `inverse` probability, to the old `norm`, or `none`."""
    seed: int = 0
    """Of the draws; inputs and tensors have different ones, steps of a recipe with one seed the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("density", self.density)

    def sparsify(self, tensors: Tensors) -> Sparsify:
        return drop(tensors, fixed(self.density), self.seed, self.rescale)

    def thinning(self, of: Extent) -> tuple[Memory, Memory]:
        return dropping(of, self.rescale, None)


SPEC: type[MergeMethod] = DareLinear
