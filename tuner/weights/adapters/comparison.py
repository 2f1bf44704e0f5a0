"""How far two changes are apart, as a file's and what it was written from."""

from typing import Any

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Change, Difference, Transform
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.low_rank import LowRank

PROBED = 8
"""Inputs, or outputs, of random weights where any number will do."""


def distance(one: Change, other: Change) -> tuple[float, float, float]:
    """‖ΔW - ΔW'‖, ‖ΔW‖, and what rounding errors are measured by: ‖U‖ ‖D‖ of a product, else ‖ΔW‖ again.

    Of DoRA the differences inside are compared, and the magnitudes must be close. Of products no matrix is formed. What
    else depends on the weight is compared by what it makes of random ones.

    Raises:
        DataError: they are of kinds that cannot be compared.
    """
    if isinstance(one, Decomposed) and isinstance(other, Decomposed):
        size = _norm(one.magnitude.double())
        apart = _norm(one.magnitude.double().flatten() - other.magnitude.double().flatten())
        inner = distance(one.inner, other.inner)
        return max(inner[0], apart / size * inner[2] if size else apart), inner[1], inner[2]
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        (left, right), (other_left, other_right) = one.factors(), other.factors()
        apart = _product_norm(torch.cat([left, -other_left], 1), torch.cat([right, other_right]))
        return apart, _product_norm(left, right), _norm(left) * _norm(right)
    if isinstance(one, Difference) and isinstance(other, Difference):
        dense = one.dense()
        size = _norm(dense)
        return _norm(dense - other.dense().reshape(dense.shape)), size, size
    if isinstance(one, Transform) and isinstance(other, Transform) and type(one) is type(other):
        shape = [size or PROBED for size in one.shape]
        shape += [PROBED] * (len(shape) == 1 and one.slot == "weight")
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        made = one.effect(weight)
        return _norm(made - other.effect(weight)), _norm(made - weight), _norm(made)
    raise DataError(f"a {type(one).__name__.lower()} cannot be compared with a {type(other).__name__.lower()}")


def adds_nothing(change: Change) -> bool:
    """Whether it is a difference of zeros, for which a layer of several has no directions."""
    if isinstance(change, LowRank):
        left, right = change.factors()
        return _product_norm(left, right) == 0
    return isinstance(change, Difference) and not bool(change.dense().any())


def _product_norm(left: Tensor, right: Tensor) -> float:
    """‖left · right‖, from their triangular factors: exact to rounding, also where directions cancel each other."""
    return _norm(_triangle(left) @ _triangle(right.mT).mT)


def _triangle(matrix: Tensor) -> Tensor:
    linalg: Any = torch.linalg
    return linalg.qr(matrix, mode="r")[1]


def _norm(values: Tensor) -> float:
    return values.square().sum().sqrt().item()
