"""The formulas of the methods that thin differences out, in float64 and in the plainest way."""

from collections.abc import Sequence

import torch
from torch import Tensor


def trimmed(tensor: Tensor, density: float, gamma: float = 0) -> Tensor:
    """The largest left out, the next largest kept; of equal ones those that come first are larger."""
    flat = tensor.double().reshape(-1)
    kept = max(1, int(density * flat.numel())) if flat.numel() and density > 0 else 0
    dropped = min(int(gamma * flat.numel()), flat.numel() - kept)
    chosen = flat.abs().argsort(descending=True, stable=True)[dropped : dropped + kept]
    return torch.zeros_like(flat).index_copy(0, chosen, flat[chosen]).reshape(tensor.shape)


def added_up(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum, with weights."""
    return torch.stack([weight * delta.double() for weight, delta in zip(weights, deltas, strict=True)]).sum(0)


def consensus(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean of what has the sign of the weighted sum; weights are positive."""
    stacked = torch.stack([delta.double() for delta in deltas])
    factors = torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * deltas[0].ndim)
    sign = (stacked * factors).sum(0).sign()
    inside = (stacked.sign() == sign) & (sign != 0)
    divisor = (factors * inside).sum(0)
    return (stacked * factors * inside).sum(0) / torch.where(divisor == 0, 1, divisor)
