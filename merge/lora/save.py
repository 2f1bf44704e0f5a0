"""Writing a LoRA and reading it back: what is saved is what was read again."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Change, Difference, Transform
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.file import Adapters, read_adapters
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.adapters.writing import to_tensors
from tuner.weights.layouts.modules import Dialect, Modules
from tuner.weights.writer import save_safetensors

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""How far what is read back may be from what was written, by the file's dtype: relative to ‖U‖ ‖D‖, which is ‖ΔW‖, or
more where directions cancel each other."""

PROBED = 8
"""Inputs, or outputs, of random weights where any number will do."""


@dataclass(frozen=True)
class Saved:
    """A file that has been written and read back."""

    path: Path
    bytes: int
    worst: float
    """The largest ‖ΔW - read back‖ / ‖ΔW‖ of all tensors: what rounding to the file's dtype costs."""
    where: str
    """The tensor that has it."""


Texts = Callable[[Mapping[str, Tensor]], Mapping[str, str]]
"""A header's texts, for the tensors of the file."""


def save(
    path: Path,
    adapters: Adapters,
    dialect: Dialect,
    modules: Modules | None = None,
    dtype: torch.dtype | None = None,
    texts: Texts = lambda tensors: {},
) -> Saved:
    """Write adapters to `path`, whole or not at all, and read them back.

    Args:
        path: the file; its folder must exist.
        adapters: what is written.
        dialect: in whose names.
        modules: those of the network, where they are known.
        dtype: of factors and differences; None keeps what they have.
        texts: the header's.

    Raises:
        DataError: the dialect has no word for something, or what is read back is something else.
        ResourceError: the disk is full or cannot be written.
    """
    tensors = to_tensors(adapters, dialect, modules, dtype)
    _refuse_infinity(tensors)
    save_safetensors(path, tensors, {"format": "pt", **texts(tensors)})
    back = read_adapters(path, modules)
    silent = {name for name, change in adapters.changes.items() if name not in back.changes and _adds_nothing(change)}
    if set(back.changes) != set(adapters.changes) - silent:
        raise DataError(f"{path}: does not read back as what was written; this is a mistake of the program")
    worst, where = 0.0, ""
    for name, change in adapters.changes.items():
        if name in silent:
            continue
        error, size, scale = distance(change, back.changes[name])
        used = dtype or _dtype(change)
        if not error <= TOLERANCE.get(used, TOLERANCE[torch.bfloat16]) * scale:
            raise DataError(
                f"{path}: {name}: what is read back differs by {error / size if size else math.inf:.2g} of its norm; "
                "write it in float32"
            )
        if size and error / size >= worst:
            worst, where = error / size, name
    return Saved(path, path.stat().st_size, worst, where)


def distance(one: Change, other: Change) -> tuple[float, float, float]:
    """‖ΔW - ΔW'‖, ‖ΔW‖, and what rounding errors are measured by: ‖U‖ ‖D‖ of a product, else ‖ΔW‖ again.

    Of DoRA the differences inside are compared, and the magnitudes must be close. Of products no matrix is formed. What
    else depends on the weight is compared by what it makes of random ones.

    Raises:
        DataError: they are of kinds that cannot be compared.
    """
    if isinstance(one, Decomposed) and isinstance(other, Decomposed):
        size = one.magnitude.double().norm().item()
        apart = (one.magnitude.double().flatten() - other.magnitude.double().flatten()).norm().item()
        inner = distance(one.inner, other.inner)
        return max(inner[0], apart / size * inner[2] if size else apart), inner[1], inner[2]
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        (left, right), (other_left, other_right) = one.factors(), other.factors()
        apart = _product_norm(torch.cat([left, -other_left], 1), torch.cat([right, other_right]))
        return apart, _product_norm(left, right), (left.norm() * right.norm()).item()
    if isinstance(one, Difference) and isinstance(other, Difference):
        dense = one.dense()
        size = dense.norm().item()
        return (dense - other.dense().reshape(dense.shape)).norm().item(), size, size
    if isinstance(one, Transform) and isinstance(other, Transform) and type(one) is type(other):
        shape = [size or PROBED for size in one.shape]
        shape += [PROBED] * (len(shape) == 1 and one.slot == "weight")
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        made = one.effect(weight)
        return (made - other.effect(weight)).norm().item(), (made - weight).norm().item(), made.norm().item()
    raise DataError(f"a {type(one).__name__.lower()} cannot be compared with a {type(other).__name__.lower()}")


def _adds_nothing(change: Change) -> bool:
    """Whether it is a difference of zeros, for which a layer of several has no directions."""
    return isinstance(change, Difference) and not change.dense().any()


def _product_norm(left: Tensor, right: Tensor) -> float:
    """‖left · right‖, from their triangular factors: exact to rounding, also where directions cancel each other."""
    _, first = torch.linalg.qr(left, mode="r")
    _, second = torch.linalg.qr(right.T, mode="r")
    return (first @ second.T).norm().item()


def _dtype(change: Change) -> torch.dtype:
    inner = change.inner if isinstance(change, Decomposed) else change
    return inner.product.left.dtype if isinstance(inner, LowRank) else torch.bfloat16


def _refuse_infinity(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"{name}: too large for {str(tensor.dtype).removeprefix('torch.')}; write it in float32")
