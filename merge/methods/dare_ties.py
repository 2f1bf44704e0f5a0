"""DARE, and then the consensus of TIES (Yu et al. 2023, arXiv:2311.03099; Yadav et al. 2023, arXiv:2306.01708)."""

from dataclasses import dataclass

from merge.coefficients import Number, fixed
from merge.methods._consensus import SignConsensus
from merge.methods._numbers import check_range
from merge.methods._sparsify import Rescale, Sparsify, drop, dropping
from merge.methods.base import Extent, Memory, MergeMethod, Tensors


@dataclass(frozen=True, kw_only=True)
class DareTies(SignConsensus):
    """scale * sum_{i in A} w_i t_i / sum_{i in A} |w_i|, where t_i = m_i d_i / density are what `dare_linear` adds up.

    A are the inputs of the elected sign, as in `ties`. An input that was dropped has no vote and does not count, so
    where one alone was kept the result is all of it, and 1 / density times all of it when rescaled: on average over
    the masks this is not the consensus of the d_i. mergekit does not divide here (divide = "none"), PEFT does by
    count.
    """

    density: Number = 0.5
    """The part that is kept, from 0 to 1: the paper's 1 - p."""
    rescale: Rescale = "inverse"
    """How kept numbers make up for dropped ones: by the `inverse` probability, to the old `norm`, or `none`."""
    seed: int = 0
    """See `dare_linear`."""

    def __post_init__(self) -> None:
        check_range("density", self.density)

    def sparsify(self, tensors: Tensors) -> Sparsify:
        return drop(tensors, fixed(self.density), self.seed, self.rescale)

    def thinning(self, of: Extent) -> tuple[Memory, Memory]:
        return dropping(of, self.rescale, None)


SPEC: type[MergeMethod] = DareTies
