"""The Karcher mean: the point of a sphere nearest to the inputs' directions, by the arcs' squares.

H. Karcher, "Riemannian Center of Mass and Mollifier Smoothing", Comm. Pure Appl. Math. 30 (1977),
doi:10.1002/cpa.3160300502; on spheres S. Buss and J. Fillmore, "Spherical Averages and Applications to Spherical
Splines and Interpolation", ACM Trans. Graphics 20 (2001), doi:10.1145/502122.502124.
"""

from dataclasses import dataclass

import numpy as np

from merge.coefficients import Number
from merge.methods._combination import check_shares, combine, combining, only, shares
from merge.methods._gram import Array, gram
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors
from merge.methods.nlerp import CANCELLED, Directions

STEPS = 1000
CLOSE = 1e-14


@dataclass(frozen=True, kw_only=True)
class Karcher(Fitted):
    """u * sum_i w_i |W_i|, where u minimises sum_i w_i angle(u, W_i)^2 and the w_i add up to 1.

    Of two inputs it is `slerp` at t = w_1. It is found by going, from `nlerp`'s u on, along the mean of the arcs that
    lead to the inputs; that mean is zero at the end. mergekit's `karcher` has equal weights only, and stops after ten
    steps in the inputs' dtype.

    An input that is zero has no direction, and counts by its length alone. Where there is no such u (directions that
    cancel, or one opposite to u) the result is sum_i w_i W_i.
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
        directions = Directions.of(found, shares(self.weights, tensors.inputs))
        return combine(directions.coefficients(center(directions)), found)


def center(directions: Directions) -> Array | None:
    """The coordinates of the Karcher mean, or None."""
    point = directions.chord()
    if point is None:
        return None
    cosines = directions.cosines
    used = (directions.weights > 0) & (directions.lengths > 0)
    weights = np.where(used, directions.weights, 0)
    weights = weights / weights.sum()
    for _ in range(STEPS):
        apart = np.eye(len(point)) - point  # row i: from the point to input i
        near = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", apart, cosines, apart), 0)) / 2
        theta = 2 * np.arcsin(np.minimum(near, 1))
        if np.any(used & (theta > np.pi - CANCELLED)):
            return None
        pull = weights / np.sinc(theta / np.pi)  # of unit vectors: theta / sin(theta)
        step = pull - (pull @ np.cos(theta)) * point
        length = np.sqrt(max(step @ cosines @ step, 0))
        if length < CLOSE:
            break
        point = np.cos(length) * point + np.sin(length) / length * step
        point = point / np.sqrt(point @ cosines @ point)
    return point


SPEC: type[MergeMethod] = Karcher
