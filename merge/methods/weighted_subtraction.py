"""Weighted subtraction: a model taken out of a weighted sum again."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods.base import Elementwise, Space
from merge.methods.lerp import interpolate


@dataclass(frozen=True, kw_only=True)
class WeightedSubtraction(Elementwise):
    """(a - t b) / (1 - t): the x of which a = (1 - t) x + t b, so that `lerp` by the same t undoes it.

    It is meh's `weighted_subtraction` with t = alpha * beta, which are only ever multiplied there. t = 0 is a, bit for
    bit. The nearer t is to 1, the more the rounding of a is blown up: by 1 / (1 - t).
    """

    t: Number = 0.25
    """The share of b that is in a; any number but 1. (meh takes 1 - 1e-10 for 1, and multiplies rounding by 1e10.)"""

    takes = (Space.EITHER, Space.EITHER)
    gives = Space.EITHER
    temporaries = 0

    def __post_init__(self) -> None:
        if self.t == 1:
            raise ValueError("t must not be 1: nothing of the other model would be left in the sum")

    def unchanged(self) -> int | None:
        return 0 if fixed(self.t) == 0 else None

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        t = fixed(self.t)
        interpolate(inputs[0], inputs[1], -t / (1 - t), out)


SPEC: type[Elementwise] = WeightedSubtraction
