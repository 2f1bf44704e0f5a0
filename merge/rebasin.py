"""Git Re-Basin: one network's units in the order of another's (Ainsworth et al. 2022, arXiv:2209.04836).

    a, b = open_store(one), open_store(other)
    aligned = align(a, b)
    Apply("blend", Lerp(t=0.5), (Source("a", a), Source("b", aligned)))

This is the paper's matching by weights: among all orders of b's units, the one that makes sum <a, b> over all tensors
as large as it gets by changing the order of one layer's units at a time. `merge.symmetries` knows which units may be
exchanged; b's network computes the same in any of these orders.

Fine-tunes of one base have their units in one order already, and nothing moves. It is for networks that were trained
apart, where it is a beginning only: what runs through the whole network keeps its place.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from merge.assignment import assign
from merge.symmetries import Axis, Orders, Permuted, Structure, Symmetry, symmetries, units_of
from tuner.errors import DataError
from tuner.weights.store import TensorStore

SWEEPS = 100
GAIN = 1e-6
"""What a new order must win, as a share of the tensors' lengths: less is rounding."""


@dataclass(frozen=True)
class Aligned(Permuted):
    """A store with its units in the order of another's."""

    @property
    def moved(self) -> dict[str, int]:
        """How many units have another place, by the name of the symmetry; those of which none has are left out."""
        counts = {
            name: max(int((order != torch.arange(len(order))).sum()) for order in orders)
            for name, orders in self.orders.items()
        }
        return {name: count for name, count in counts.items() if count}


def align(a: TensorStore, b: TensorStore, structure: Structure | None = None) -> Aligned:
    """`b` in the order of `a`.

    Args:
        a: a checkpoint, or one component of it.
        b: another one with the same tensors.
        structure: what shapes do not tell; None for that of the checkpoint's family.

    Raises:
        DataError: they are of unlike networks, or of none whose symmetries are known.
    """
    known = symmetries(b.metas, structure or Structure.of(b.metas))
    if not known:
        raise DataError("nothing in these tensors may change places, as far as is known; merge without aligning")
    for symmetry in known:
        for axis in (axis for role in symmetry.roles for axis in role):
            if axis.tensor not in a.metas or a.metas[axis.tensor].shape != b.metas[axis.tensor].shape:
                raise DataError(f"{axis.tensor}: is not in both networks, in one shape; they cannot be aligned")
    touching: dict[str, set[str]] = {}
    for symmetry in known:
        for axis in (axis for role in symmetry.roles for axis in role):
            touching.setdefault(axis.tensor, set()).add(symmetry.name)
    aligned = Aligned(b, known, {})
    waiting = {symmetry.name for symmetry in known}
    for _ in range(SWEEPS):
        for symmetry in known:
            if symmetry.name in waiting:
                waiting.discard(symmetry.name)
                better = _best(a, aligned, symmetry)
                if better is not None:
                    aligned = replace(aligned, orders={**aligned.orders, symmetry.name: better})
                    for axis in (axis for role in symmetry.roles for axis in role):
                        waiting |= touching[axis.tensor] - {symmetry.name}
        if not waiting:
            break
    return aligned


def _best(a: TensorStore, b: Permuted, symmetry: Symmetry) -> Orders | None:
    """The best order of one symmetry's units while all others stay; None when theirs is as good."""
    tables = [_similarity(a, b, axes) for axes in symmetry.roles]
    blocks, size = symmetry.blocks, symmetry.units // symmetry.blocks
    within = np.empty((len(tables), blocks, blocks, size), dtype=np.int64)
    gains = np.zeros((blocks, blocks))
    for role, (table, _) in enumerate(tables):
        parts = table.reshape(blocks, size, blocks, size)
        for to in range(blocks):
            for source in range(blocks):
                part = parts[to, :, source]
                order = assign(part)
                within[role, to, source] = order
                gains[to, source] += part[np.arange(size), order].sum()
    sources = assign(gains)
    now = sum(float(np.trace(table)) for table, _ in tables)
    won = float(gains[np.arange(blocks), sources].sum()) - now
    if won <= GAIN * sum(scale for _, scale in tables):
        return None
    found: list[Tensor] = []
    for role in range(len(tables)):
        moves = [within[role, to, source] + source * size for to, source in enumerate(sources)]
        found.append(torch.from_numpy(np.concatenate(moves)))
    before = b.orders.get(symmetry.name)
    return tuple(found) if before is None else tuple(old[new] for old, new in zip(before, found, strict=True))


def _similarity(a: TensorStore, b: TensorStore, axes: tuple[Axis, ...]) -> tuple[np.ndarray, float]:
    """`[units of a, units of b]`: the inner products of all that belongs to two units; and |a| |b| of it all."""
    total: Tensor | None = None
    squares = [0.0, 0.0]
    for axis in axes:
        one, other = (units_of(store.read(axis.tensor).float(), axis) for store in (a, b))
        products = torch.einsum("cin,cjn->ij", one, other).double()
        total = products if total is None else total.add_(products)
        squares[0] += one.double().square().sum().item()
        squares[1] += other.double().square().sum().item()
    assert total is not None, "a role has tensors"
    return total.numpy(), float(np.sqrt(squares[0] * squares[1]))
