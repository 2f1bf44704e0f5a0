"""The largest of the inputs, number by number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merge.methods.base import Elementwise, Space
from merge.scratch import scratch


@dataclass(frozen=True, kw_only=True)
class Maximum(Elementwise):
    """Of the numbers at one place the one that is largest, by magnitude or by value.

    By magnitude it is made for differences: at each place the model that has learned most there wins. Numbers of one
    magnitude and opposite signs give the positive one, so that the inputs' order never counts. By value it is
    Chattiori's `max` mode, which shifts weights upwards as a whole.
    """

    by: Literal["magnitude", "value"] = "magnitude"
    """What is compared."""

    takes = (Space.EITHER, Space.EITHER)
    repeats = True
    gives = Space.EITHER
    temporaries = 2.25

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        torch.maximum(inputs[0], inputs[1], out=out)
        if self.by == "value":
            for tensor in inputs[2:]:
                torch.maximum(out, tensor, out=out)
            return
        # of the largest and the smallest value, one has the largest magnitude
        with scratch(out, 2) as (least, opposite), scratch(out, dtype=torch.bool) as (above,):
            torch.minimum(inputs[0], inputs[1], out=least)
            for tensor in inputs[2:]:
                torch.maximum(out, tensor, out=out)
                torch.minimum(least, tensor, out=least)
            torch.ge(out, torch.neg(least, out=opposite), out=above)
            torch.where(above, out, least, out=out)


SPEC: type[Elementwise] = Maximum
