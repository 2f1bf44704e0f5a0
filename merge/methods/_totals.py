"""Sums of all numbers of a tensor that are the same on every machine."""

from torch import Tensor


def total(terms: Tensor) -> float:
    """The sum in float64, each half added to the other elementwise: `torch.sum` adds up as wide as the processor is."""
    terms = terms.double().reshape(-1)
    while terms.numel() > 1:
        half = (terms.numel() + 1) // 2
        folded = terms[:half].clone()
        folded[: terms.numel() - half] += terms[half:]
        terms = folded
    return float(terms.sum())
