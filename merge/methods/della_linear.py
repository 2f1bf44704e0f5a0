"""DELLA without the election: drop at random, small numbers more often (Deep et al. 2024, arXiv:2406.11617)."""

from dataclasses import dataclass

from merge.coefficients import Number, fixed
from merge.methods._consensus import SparseSum
from merge.methods._numbers import check_range
from merge.methods._sparsify import Ranks, Rescale, Sparsify, drop_by_rank, dropping
from merge.methods.base import Extent, Memory, MergeMethod, Tensors


@dataclass(frozen=True, kw_only=True)
class DellaLinear(SparseSum):
    """scale * sum_i w_i m_i d_i / p_i, m_i being 1 with the probability p_i = density + epsilon (2 r_i - 1).

    r_i is the rank of |d_i|, from 0 for the smallest to 1 for the largest, so that the mean of p_i is the density; p_i
    is held between 0 and 1. Equal numbers have the mean of their ranks. A row is what one output is made of, all
    dimensions but the first; a vector, and a tensor whose rows have one number each, is one row, and a tensor of one
    number has rank 1/2. With epsilon = 0 this is `dare_linear`, with the same numbers kept for the same seed.

    Ranks in rows are rounded to 1/254, and held: one byte for each number and input. For ranks in the whole tensor
    nothing is held, and numbers have one rank if they differ by less than 1 part in 256.

    mergekit ranks along the second dimension, which fails where that is 1, and rescales by the norm.
    """

    density: Number = 0.5
    """The part that is kept, from 0 to 1: the paper's 1 - p."""
    epsilon: Number = 0.1
    """Half the width of the window of probabilities, as in the authors' code and mergekit; from -1 to 1. The paper's is
    the whole width, from p - epsilon / 2 on, as sd-mecha's: give half of that. A negative one prefers small numbers."""
    ranks: Ranks = "row"
    """Among which numbers one is ranked: those of its `row`, or of its `tensor`."""
    rescale: Rescale = "inverse"
    """`inverse` divides by the p_i of each number."""
    seed: int = 0
    """See `dare_linear`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("density", self.density)
        check_range("epsilon", self.epsilon, -1, 1)

    def sparsify(self, tensors: Tensors) -> Sparsify:
        return drop_by_rank(tensors, fixed(self.density), fixed(self.epsilon), self.ranks, self.seed, self.rescale)

    def thinning(self, of: Extent) -> tuple[Memory, Memory]:
        return dropping(of, self.rescale, self.ranks)


SPEC: type[MergeMethod] = DellaLinear
