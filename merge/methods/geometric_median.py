"""The geometric median: the point whose distances to the inputs have the smallest sum.

E. Weiszfeld, "Sur le point pour lequel la somme des distances de n points donnés est minimum", Tôhoku Math. J. 43
(1937), translated in doi:10.1007/s10479-008-0352-z; where a step meets an input: Y. Vardi and C.-H. Zhang, "The
multivariate L1-median and associated data depth", PNAS 97 (2000), doi:10.1073/pnas.97.4.1423.
"""

from dataclasses import dataclass

import numpy as np

from merge.coefficients import Number
from merge.methods._combination import check_shares, combine, combining, only, shares
from merge.methods._gram import Array, gram
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors

STEPS = 10_000
CLOSE = 1e-13
"""A step shorter than this share of the mean distance is the last one."""


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Fitted):
    """argmin_m sum_i w_i |m - W_i|, the whole tensor being one vector.

    Up to half of the inputs (by weight) may be anywhere without taking it along: it is a mean that strays are kept
    out of. An input that weighs more than all others is the median by itself.

    Inputs on one line, as any two are, may have many medians; of two with equal weights it is the middle. Worked out
    to convergence, so the order of the inputs does not matter (sd-mecha takes at most 100 steps, in float32).
    """

    weights: tuple[Number, ...] = ()
    """One for each input, 0 or more; none: equal ones."""

    takes = (Space.EITHER, Space.EITHER)
    repeats = True
    gives = Space.EITHER

    def __post_init__(self) -> None:
        check_shares(self.weights)

    def unchanged(self) -> int | None:
        return only(self.weights)

    def memory(self, of: Extent) -> Memory:
        return combining(of)

    def fit(self, tensors: Tensors) -> Merge:
        found = gram(tensors)
        return combine(median(found.differences[:, :, 0], shares(self.weights, tensors.inputs))[:, None], found)


def median(inner: Array, weights: Array) -> Array:
    """Shares `[N]` of N points in their median; `inner` `[N, N]` are their inner products seen from one of them."""
    units = np.eye(len(weights))
    for k, unit in enumerate(units):
        pull = _pull(inner, weights, units - unit)
        alike = pull == 0
        if _length(inner, pull @ (units - unit)) < weights[alike].sum() * (1 - CLOSE) and weights[k] > 0:
            return unit
    point = weights
    for _ in range(STEPS):
        apart = units - point
        pull = _pull(inner, weights, apart)
        if pull.sum() == 0:
            break  # all points are one
        step = pull @ apart / pull.sum()
        here = weights[(pull == 0)].sum()
        if here > 0:  # on an input, which holds on to the point by its weight
            step = step * max(0, 1 - here / _length(inner, pull @ apart))
        point = point + step
        scale = weights @ np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", apart, inner, apart), 0))
        if _length(inner, step) <= CLOSE * scale:
            break
    return point


def _length(inner: Array, vector: Array) -> float:
    return float(np.sqrt(max(vector @ inner @ vector, 0)))


def _pull(inner: Array, weights: Array, apart: Array) -> Array:
    """How strongly each point pulls, weight over distance; 0 for those that are where the pull is felt."""
    distances = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", apart, inner, apart), 0))
    return np.divide(weights, distances, out=np.zeros_like(distances), where=distances > 0)


SPEC: type[MergeMethod] = GeometricMedian
