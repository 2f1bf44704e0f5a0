"""A model as it is: to write it out in another dtype or layout, or to take single components of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from merge.methods.base import Elementwise, Space


@dataclass(frozen=True, kw_only=True)
class Passthrough(Elementwise):
    """The input, bit for bit. (mergekit's `passthrough` scales too: here that is `scale`.)"""

    takes = (Space.EITHER,)
    gives = Space.EITHER
    temporaries = 0

    def unchanged(self) -> int | None:
        return 0

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        out.copy_(inputs[0])


SPEC: type[Elementwise] = Passthrough
