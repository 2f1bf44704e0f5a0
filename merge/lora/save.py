"""Writing a LoRA and reading it back: what is saved is what was read again."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Change
from tuner.weights.adapters.comparison import adds_nothing, distance
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.file import Adapters, read_adapters
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.adapters.writing import to_tensors
from tuner.weights.layouts.modules import Dialect, Modules
from tuner.weights.writer import resource_error, save_safetensors, sync_folder

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""How far what is read back may be from what was written, by the file's dtype: relative to ‖U‖ ‖D‖, which is ‖ΔW‖, or
more where directions cancel each other."""


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
    place = Path(os.path.realpath(path))
    unread = place.with_name(f".{place.name}.part")
    try:
        save_safetensors(unread, tensors, {"format": "pt", **texts(tensors)})
        worst, where = _compared(adapters, read_adapters(unread, modules), path, dtype)
        unread.replace(place)
        sync_folder(place.parent)
    except OSError as error:
        raise resource_error(path, error) from error
    finally:
        unread.unlink(missing_ok=True)
    return Saved(path, path.stat().st_size, worst, where)


def _compared(adapters: Adapters, back: Adapters, path: Path, dtype: torch.dtype | None) -> tuple[float, str]:
    """The largest error of what was read `back`, and of which tensor.

    Raises:
        DataError: it is something else.
    """
    silent = {name for name, change in adapters.changes.items() if name not in back.changes and adds_nothing(change)}
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
    return worst, where


def _dtype(change: Change) -> torch.dtype:
    inner = change.inner if isinstance(change, Decomposed) else change
    return inner.product.left.dtype if isinstance(inner, LowRank) else torch.bfloat16


def _refuse_infinity(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise DataError(f"{name}: too large for {str(tensor.dtype).removeprefix('torch.')}; write it in float32")
