"""DELLA: drop small numbers more often, elect a sign, merge what agrees (Deep et al. 2024, arXiv:2406.11617)."""

from dataclasses import dataclass

from merge.coefficients import Number, fixed
from merge.methods._consensus import SignConsensus
from merge.methods._numbers import check_range
from merge.methods._sparsify import Ranks, Rescale, Sparsify, drop_by_rank, dropping
from merge.methods.base import Extent, Memory, MergeMethod, Tensors


@dataclass(frozen=True, kw_only=True)
class Della(SignConsensus):
    """scale * sum_{i in A} w_i t_i / sum_{i in A} |w_i|, where t_i = m_i d_i / p_i are what `della_linear` adds up.

    A are the inputs of the elected sign, as in `ties`; ranks, probabilities and what is held as in `della_linear`. With
    epsilon = 0 this is `dare_ties`. sd-mecha's window is half as wide for the same epsilon.
    """

    density: Number = 0.5
    """The part that is kept, from 0 to 1: the paper's 1 - p."""
    epsilon: Number = 0.1
    """Half the width of the window of probabilities; from -1 to 1, a negative one prefers small numbers. The paper's is
    the whole width."""
    ranks: Ranks = "row"
    """Among which numbers one is ranked: those of its `row`, or of its `tensor`."""
    rescale: Rescale = "inverse"
    """`inverse` divides by the p_i of each number."""
    seed: int = 0
    """See `dare_linear`."""

    def __post_init__(self) -> None:
        check_range("density", self.density)
        check_range("epsilon", self.epsilon, -1, 1)

    def sparsify(self, tensors: Tensors) -> Sparsify:
        return drop_by_rank(tensors, fixed(self.density), fixed(self.epsilon), self.ranks, self.seed, self.rescale)

    def thinning(self, of: Extent) -> tuple[Memory, Memory]:
        return dropping(of, self.rescale, self.ranks)


SPEC: type[MergeMethod] = Della
