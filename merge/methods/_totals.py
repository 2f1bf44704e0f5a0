"""Sums of all numbers of a tensor that are the same on every machine."""

import torch
from torch import Tensor

from merge.scratch import scratch


def total(terms: Tensor, *, squared: bool = False) -> float:
    """The sum of a flat tensor, or of its squares, in float64."""
    with scratch(terms, dtype=torch.float64) as (sums,):
        sums.copy_(terms)
        return summed(sums.square_() if squared else sums)


def summed(terms: Tensor) -> float:
    """The sum of a flat tensor, which is overwritten: each half is added to the other elementwise.

    `torch.sum` adds up as wide as the processor is.
    """
    count = terms.numel()
    while count > 1:
        half = (count + 1) // 2
        terms[: count - half] += terms[half:count]
        count = half
    return terms[0].item() if count else 0.0
