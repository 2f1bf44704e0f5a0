"""The mean of directions along the chord, with the mean of the lengths: slerp's shortcut, for any number of inputs."""

from dataclasses import dataclass

import numpy as np

from merge.coefficients import Number
from merge.methods._combination import check_shares, combine, combining, only, shares
from merge.methods._gram import Array, Gram, gram
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors

CANCELLED = 1e-5
"""A mean of unit vectors shorter than this is what rounding left of it, and points nowhere."""


@dataclass(frozen=True, kw_only=True)
class Nlerp(Fitted):
    """m / |m| * sum_i w_i |W_i|, where m = sum_i w_i W_i / |W_i| and the w_i add up to 1.

    This is what mergekit's `multislerp` computes: its step in the tangent space of m is zero always, for the mean of
    the directions lies along m. The mean that `multislerp` is after is `karcher`.

    An input that is zero has no direction, and counts by its length alone. Where the directions cancel, the result is
    sum_i w_i W_i.
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
        return combine(directions.coefficients(directions.chord()), found)


@dataclass(frozen=True)
class Directions:
    """N inputs as points on the unit sphere. Other points are given by coordinates `[N]`: sum_i y_i W_i / |W_i|."""

    lengths: Array
    cosines: Array
    """`[N, N]`: inner products of the points."""
    weights: Array
    """How much each input counts; together 1."""

    @classmethod
    def of(cls, gram: Gram, weights: Array) -> "Directions":
        """The directions of whole tensors."""
        count = len(weights)
        cosines = [[1 - 2 * np.sin(gram.angle(i, j).item() / 2) ** 2 for j in range(count)] for i in range(count)]
        return cls(gram.norms[:, 0], np.array(cosines), weights)

    def chord(self) -> Array | None:
        """The coordinates of m / |m|; None when it points nowhere."""
        mean = self.weights * (self.lengths > 0)
        length = np.sqrt(max(mean @ self.cosines @ mean, 0))
        return mean / length if length > CANCELLED * mean.sum() else None

    def coefficients(self, point: Array | None) -> Array:
        """The direction `point` at the mean of the lengths, as coefficients `[N, 1]`; None: the inputs' mean."""
        if point is None:
            return self.weights[:, None]
        scales = np.divide(self.weights @ self.lengths, self.lengths, out=np.zeros_like(point), where=self.lengths > 0)
        return (point * scales)[:, None]


SPEC: type[MergeMethod] = Nlerp
