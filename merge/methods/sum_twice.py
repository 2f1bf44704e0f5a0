"""Sum twice: a third model interpolated into the interpolation of two."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods.base import Elementwise, Space
from merge.methods.lerp import interpolate


@dataclass(frozen=True, kw_only=True)
class SumTwice(Elementwise):
    """(1 - beta) ((1 - alpha) a + alpha b) + beta c: `sumTwice` in supermerger, `sum_twice` in meh.

    beta = 1 is c, and beta = 0 is a or b where alpha = 0 or 1, bit for bit.
    """

    alpha: Number = 0.5
    """The share of b beside a; any number, one outside of [0, 1] extrapolates."""
    beta: Number = 0.5
    """The share of c in the whole; as `alpha`."""

    takes = (Space.EITHER, Space.EITHER, Space.EITHER)
    gives = Space.EITHER
    temporaries = 0

    def unchanged(self) -> int | None:
        if fixed(self.beta) == 1:
            return 2
        return {0.0: 0, 1.0: 1}.get(fixed(self.alpha)) if fixed(self.beta) == 0 else None

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        a, b, c = inputs
        interpolate(a, b, fixed(self.alpha), out)
        interpolate(out, c, fixed(self.beta), out)


SPEC: type[Elementwise] = SumTwice
