"""TIES: trim, elect a sign, merge what agrees with it (Yadav et al. 2023, arXiv:2306.01708)."""

from dataclasses import dataclass

from merge.coefficients import Number, fixed
from merge.methods._consensus import SignConsensus
from merge.methods._numbers import check_range
from merge.methods._sparsify import Sparsify, trim, trimming
from merge.methods.base import Extent, Memory, MergeMethod, Tensors


@dataclass(frozen=True, kw_only=True)
class Ties(SignConsensus):
    """scale * sum_{i in A} w_i t_i / sum_{i in A} |w_i|, where t_i = trim(d_i).

    A are the inputs with sgn(w_i t_i) = sgn(sum_j w_j t_j), the elected sign. Trimming keeps of each d_i the largest
    numbers by magnitude, as `magnitude` does: of each tensor by itself, as in all programs below; the paper trims the
    whole of a model's difference at once. With equal weights the rest is the paper's formula. The others' differ from
    it and from each other:

        mergekit  draw = "positive" (its `normalize: false` is divide = "none")
        PEFT      elect = "sum", or "count" for `frequency`; draw = "positive", divide = "count"
        sd-mecha  elect = "count", or "sum" if `vote_sgn`; divide = "count"; it has no weights

    For inputs of different densities, trim them with `magnitude` first and say density = 1 here.
    """

    density: Number = 0.2
    """The part of each input that is kept, from 0 to 1; the paper's default."""

    def __post_init__(self) -> None:
        check_range("density", self.density)

    def sparsify(self, tensors: Tensors) -> Sparsify:
        return trim(tensors, fixed(self.density))

    def thinning(self, of: Extent) -> tuple[Memory, Memory]:
        return trimming(of, fixed(self.density))


SPEC: type[MergeMethod] = Ties
