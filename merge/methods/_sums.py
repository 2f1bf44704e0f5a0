"""Weighted sums of any number of inputs: what each one's factor is, and adding up."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merge.coefficients import Number, Varying, fixed
from merge.methods._numbers import one_each

CANCELLED = 1e-9
"""Weights whose sum is this small beside their magnitudes add up to zero, but for rounding."""


def refuse_zero_sum(weights: Sequence[Number]) -> None:
    """Raise where nothing can be divided by the sum of `weights`; those that vary are looked at when resolved.

    Raises:
        ValueError: they add up to zero.
    """
    numbers = [weight for weight in weights if not isinstance(weight, Varying)]
    if numbers and len(numbers) == len(weights) and _cancelled(numbers):
        raise ValueError(f"weights must not add up to 0 where they are divided by their sum, got {numbers}")


def factors(weights: Sequence[Number], inputs: int, *, normalize: bool) -> list[float]:
    """The factor of each input: `weights`, 1 each when there are none, divided by their sum if `normalize`.

    Raises:
        ConfigError: not one weight for each of `inputs`.
    """
    numbers = one_each(weights, inputs)
    total = math.fsum(numbers) if normalize else 1.0
    return [number / total for number in numbers]


def sole(weights: Sequence[Number], *, normalize: bool) -> int | None:
    """The input that a sum by `weights` is, because it has a factor of 1 and all others have 0."""
    used = [index for index, weight in enumerate(weights) if fixed(weight) != 0]
    return used[0] if len(used) == 1 and (normalize or fixed(weights[used[0]]) == 1) else None


def add_up(inputs: Sequence[Tensor], by: Sequence[float], out: Tensor) -> None:
    """Write the sum of `inputs`, each times its number in `by`. What counts 0 is not looked at: not even its NaNs."""
    counted = [(tensor, factor) for tensor, factor in zip(inputs, by, strict=True) if factor != 0]
    if not counted:
        out.zero_()
        return
    tensor, factor = counted[0]
    torch.mul(tensor, factor, out=out)
    for tensor, factor in counted[1:]:
        out.add_(tensor, alpha=factor)


def _cancelled(numbers: Sequence[float]) -> bool:
    return abs(math.fsum(numbers)) <= CANCELLED * math.fsum(abs(number) for number in numbers)
