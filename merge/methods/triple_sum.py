"""Triple sum: the weighted average of three models, given by the shares of two."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._sums import add_up
from merge.methods.base import Elementwise, Space


@dataclass(frozen=True, kw_only=True)
class TripleSum(Elementwise):
    """(1 - alpha - beta) a + alpha b + beta c: `tripleSum` in supermerger, `triple_sum` in meh.

    Shares of 1 and 0 are the input of share 1, bit for bit. Where alpha + beta exceed 1, the share of a is negative;
    that extrapolates, and is right as it stands. (supermerger interpolates twice and divides by alpha + beta, which
    is wrong by rounding where they nearly cancel.)
    """

    alpha: Number = 1 / 3
    """The share of b; any number."""
    beta: Number = 1 / 3
    """The share of c; any number."""

    takes = (Space.EITHER, Space.EITHER, Space.EITHER)
    gives = Space.EITHER
    temporaries = 0

    @property
    def shares(self) -> tuple[float, float, float]:
        """Those of a, b and c, which add up to 1."""
        alpha, beta = fixed(self.alpha), fixed(self.beta)
        return 1 - alpha - beta, alpha, beta

    def unchanged(self) -> int | None:
        return self.shares.index(1) if sorted(self.shares) == [0, 0, 1] else None

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        add_up(inputs, self.shares, out)


SPEC: type[Elementwise] = TripleSum
