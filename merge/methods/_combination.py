"""Linear combinations of the inputs, and the shares that say how much each one counts."""

from collections.abc import Sequence
from math import fsum, inf

import numpy as np
import torch
from torch import Tensor

from merge.coefficients import Number, Varying, fixed
from merge.methods._gram import SPLIT, Array, Gram, Per, Vectors
from merge.methods._numbers import check_range, one_each
from merge.methods.base import Extent, Memory, Merge
from merge.scratch import scratch

ROUNDED = 1e-14
"""Coefficients that add up to 1 within this were meant to."""


def combining(of: Extent, per: Per = "tensor") -> Memory:
    """What `gram` and `combine` take."""
    vectors = Vectors.of(of.shape, per)
    sums = of.inputs**2 * 8 * (2 * vectors.count if vectors.count > 1 else min(SPLIT, of.elements))
    merging = of.size if vectors.count == 1 else 8 + 2 * of.size
    return Memory(max(merging, (of.inputs + 1) * 8) * of.run, sums)


def combine(coefficients: Array, gram: Gram) -> Merge:
    """sum_i c_i W_i, `coefficients` being `[N, G]`: one for each input, in each of the vectors of `gram`.

    It is worked out as (sum_i c_i) W_0 + sum_i c_i (W_i - W_0). Where the inputs are close to each other that loses
    nothing of what they differ by, and where they are equal and the c_i add up to 1 it is exactly the input. An input
    that points away from the first one is taken by its opposite, -c_i (-W_i): W_0 + W_i is then the small difference.
    """
    signs = np.where(gram.inputs[0] < 0, -1.0, 1.0)
    signs[0] = 1
    totals = np.sum(coefficients * signs, axis=0)
    totals = np.where(abs(totals - 1) <= ROUNDED, 1, totals)
    if gram.vectors.count == 1:
        return _of_tensors(coefficients[:, 0].tolist(), signs[:, 0].tolist(), totals.item())

    def merge(inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
        with scratch(out, dtype=torch.int64) as (vectors,), scratch(out, 2) as (spread, difference):

            def of_each(numbers: Array) -> Tensor:
                return torch.index_select(torch.from_numpy(numbers).to(out), 0, vectors, out=spread)

            gram.vectors.which(start, vectors)
            torch.mul(inputs[0], of_each(totals), out=out)
            for tensor, numbers, sign in zip(inputs[1:], coefficients[1:], signs[1:], strict=True):
                torch.addcmul(tensor, inputs[0], of_each(sign), value=-1, out=difference)
                out.addcmul_(difference, of_each(numbers))

    return merge


def _of_tensors(coefficients: list[float], signs: list[float], total: float) -> Merge:
    used = [index for index, number in enumerate(coefficients) if number != 0]
    only = used[0] if len(used) == 1 and coefficients[used[0]] == 1 else None

    def merge(inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
        if only is not None:
            out.copy_(inputs[only])
            return
        torch.mul(inputs[0], total, out=out)
        with scratch(out) as (difference,):
            for index in used:
                if index > 0:
                    torch.sub(inputs[index], inputs[0], alpha=signs[index], out=difference)
                    out.add_(difference, alpha=coefficients[index])

    return merge


def check_shares(weights: Sequence[Number]) -> None:
    """Refuse `weights` that cannot be shares; of those that vary, all being zero is told once they are resolved.

    Raises:
        ValueError: one is negative, or all are zero.
    """
    for weight in weights:
        check_range("weights", weight, high=inf)
    if weights and not any(isinstance(weight, Varying) or weight for weight in weights):
        raise ValueError("weights: all are 0, so there is nothing to merge")


def shares(weights: Sequence[Number], inputs: int) -> Array:
    """`weights` divided by their sum, `[N]`; equal ones when there are none.

    Raises:
        ConfigError: not one for each of `inputs`.
    """
    numbers = one_each(weights, inputs)
    return np.array(numbers) / fsum(numbers)


def only(weights: Sequence[Number]) -> int | None:
    """The input that counts alone, where `weights` say so."""
    used = [index for index, weight in enumerate(weights) if fixed(weight) != 0]
    return used[0] if len(used) == 1 else None
