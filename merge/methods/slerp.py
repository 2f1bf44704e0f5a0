"""Spherical linear interpolation (K. Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from merge.coefficients import Number, fixed
from merge.methods._combination import combine, combining
from merge.methods._gram import Array, Gram, gram
from merge.methods.base import Extent, Fitted, Memory, Merge, MergeMethod, Space, Tensors

OPPOSITE = 1e-5
"""Nearer to pi than this, which way round the sphere is a matter of how the files were rounded."""

Lengths = Literal["between", "free"]


@dataclass(frozen=True, kw_only=True)
class Slerp(Fitted):
    """[sin((1 - t) theta) a + sin(t theta) b] / sin(theta), theta being the angle between a and b.

    The whole tensor is one vector. Two fine-tunes of one base stand at an angle so small that this is lerp, to the
    last digit that 16 bits hold; it means something for their differences to the base.

    Where there is no arc it is lerp: an input is zero, or they point in opposite directions (so do two tensors of one
    number with unlike signs), to 1e-5.
    """

    t: Number = 0.5
    """0 is a and 1 is b, usually between them; beyond them it goes on along the circle."""
    lengths: Lengths = "between"
    """`between`: the formula gives the direction, of unit vectors, and the length is (1 - t) |a| + t |b| (as in
    sd-mecha). `free`: the formula on the tensors as they are (as in mergekit), where the longer one has more to say
    about the direction. They differ only where the inputs' lengths do."""

    takes = (Space.EITHER, Space.EITHER)
    gives = Space.EITHER

    def unchanged(self) -> int | None:
        return {0.0: 0, 1.0: 1}.get(fixed(self.t))

    def memory(self, of: Extent) -> Memory:
        return combining(of)

    def fit(self, tensors: Tensors) -> Merge:
        found = gram(tensors)
        return combine(arc(found, fixed(self.t), self.lengths), found)


def arc(gram: Gram, t: float, lengths: Lengths) -> Array:
    """The coefficients `[2, G]` of two inputs at `t` of the way from the first to the second."""
    a, b = gram.norms
    theta = gram.angle(0, 1)
    straight = (theta == 0) | (theta > np.pi - OPPOSITE)
    sine = np.where(straight, 1, np.sin(theta))
    first = np.where(straight, 1 - t, np.sin((1 - t) * theta) / sine)
    second = np.where(straight, t, np.sin(t * theta) / sine)
    if lengths == "between":
        length = (1 - t) * a + t * b
        first *= np.divide(length, a, out=np.ones_like(a), where=~straight)
        second *= np.divide(length, b, out=np.ones_like(b), where=~straight)
    return np.stack([first, second])


SPEC: type[MergeMethod] = Slerp
