"""Sums of all numbers of a tensor that are the same on every machine."""

import torch
from torch import Tensor

from merge.scratch import scratch


def total(terms: Tensor, *, squared: bool = False) -> float:
    """The sum of a flat tensor, or of its squares, in float64: each half is added to the other elementwise.

    `torch.sum` adds up as wide as the processor is.
    """
    count = terms.numel()
    if count == 0:
        return 0.0
    with scratch(terms, dtype=torch.float64) as (sums,):
        sums.copy_(terms)
        if squared:
            sums.square_()
        while count > 1:
            half = (count + 1) // 2
            sums[: count - half] += sums[half:count]
            count = half
        return sums[0].item()
