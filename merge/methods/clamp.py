"""Clamp: a model kept between others, the `intersection` of what they allow."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods.base import Elementwise, Extent, Memory, Space
from merge.methods.lerp import interpolate
from merge.scratch import scratch


@dataclass(frozen=True, kw_only=True)
class Clamp(Elementwise):
    """min(max(a, low), high), where the bounds' least and largest numbers at each place are low and high.

    The first input is clamped, all others are bounds: sd-mecha's `clamp`, and with the two models of a merge as bounds
    meh's `weights_clip`. Where all bounds agree the result is theirs, whatever a is.
    """

    stiffness: Number = 0.0
    """How far low and high are drawn in, from 0 to 1: at 1 they are the bounds next to the mean of all, on either side
    of it. So it takes three bounds to matter."""

    takes = (Space.EITHER, Space.EITHER, Space.EITHER)
    repeats = True
    gives = Space.EITHER

    def __post_init__(self) -> None:
        check_range("stiffness", self.stiffness)

    def memory(self, of: Extent) -> Memory:
        drawn_in = fixed(self.stiffness) != 0 and of.inputs > 3
        return Memory((2 * of.size + (4 * of.size + 1 if drawn_in else 0)) * of.run)

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        a, *bounds = inputs
        with scratch(out, 2) as (low, high):
            low.copy_(bounds[0])
            high.copy_(bounds[0])
            for bound in bounds[1:]:
                torch.minimum(low, bound, out=low)
                torch.maximum(high, bound, out=high)
            if fixed(self.stiffness) != 0 and len(bounds) > 2:
                self._draw_in(low, high, bounds)
            torch.maximum(a, low, out=out)
            torch.minimum(out, high, out=out)

    def _draw_in(self, low: Tensor, high: Tensor, bounds: Sequence[Tensor]) -> None:
        """Move `low` and `high` towards the bounds on their sides of the mean that are next to it."""
        with scratch(low, 4) as (mean, below, above, nearer), scratch(low, dtype=torch.bool) as (side,):
            mean.zero_()
            for bound in bounds:
                mean.add_(bound)
            mean.div_(len(bounds))
            below.copy_(low)
            above.copy_(high)
            for bound in bounds:
                torch.le(bound, mean, out=side)
                torch.where(side, torch.maximum(below, bound, out=nearer), below, out=below)
                torch.ge(bound, mean, out=side)
                torch.where(side, torch.minimum(above, bound, out=nearer), above, out=above)
            interpolate(low, below, fixed(self.stiffness), low)
            interpolate(high, above, fixed(self.stiffness), high)


SPEC: type[Elementwise] = Clamp
