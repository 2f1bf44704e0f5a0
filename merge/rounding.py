"""The one rounding of a merge: from the dtype of the arithmetic to the dtype of the output."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CELL = 1 << 16
"""Numbers whose random bits come from one generator."""


@dataclass(frozen=True)
class Rounding:
    """To the nearest number, or to one of the two neighbours at random, so that small changes survive on average."""

    stochastic: bool = False
    seed: int = 0

    def store(self, values: Tensor, out: Tensor, name: str, start: int) -> None:
        """Write `values`, the numbers of the tensor `name` from `start` on, into `out`, of the output's dtype."""
        if not self.stochastic or out.dtype == values.dtype:
            out.copy_(values)
            return
        nearest = values.to(out.dtype)
        back = nearest.to(values.dtype)
        error = values - back
        other = _neighbour(nearest, up=error > 0).to(values.dtype)
        step = other - back
        share = torch.where(step != 0, error / step, torch.zeros_like(error))
        drawn = torch.from_numpy(self._uniform(name, start, values.numel())).to(values.device, values.dtype)
        limit = torch.finfo(out.dtype).max
        take = (drawn < share) & (other.abs() <= limit)
        out.copy_(torch.where(take, other, back))

    def _uniform(self, name: str, start: int, count: int) -> NDArray[np.float64]:
        """Numbers in [0, 1) that depend on the seed, the tensor's name and the place in it, and on nothing else."""
        parts: list[NDArray[np.float64]] = []
        for cell in range(start // CELL, -(-(start + count) // CELL)):
            key = hashlib.blake2b(f"round {self.seed} {name} {cell}".encode(), digest_size=16).digest()
            raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(CELL)
            low, high = max(start - cell * CELL, 0), min(start + count - cell * CELL, CELL)
            parts.append((raw[low:high] >> np.uint64(11)).astype(np.float64) * 2.0**-53)
        return np.concatenate(parts) if parts else np.empty(0)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _neighbour(values: Tensor, up: Tensor) -> Tensor:
    """The next number of `values`' dtype, towards plus infinity where `up`, else towards minus infinity."""
    bits = values.view(_BITS[values.dtype.itemsize])
    sign = torch.iinfo(bits.dtype).min
    away = (bits >= 0) == up  # bit patterns grow with the distance from zero
    stepped = torch.where(away, bits + 1, bits - 1)
    zero = (bits == 0) | (bits == sign)
    smallest = torch.where(up, torch.ones_like(bits), torch.full_like(bits, sign + 1))
    return torch.where(zero, smallest, stepped).view(values.dtype)
