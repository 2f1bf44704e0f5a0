"""Changes to some of a layer's rows, and to layers that are put one on another.

Single files of Stable Diffusion 3 and Flux have the queries', keys' and values' layers in one. A change of that one is
cut into changes of the three, and three are joined to one. Nothing is computed anew: rows of a product are rows of its
left factor, and a product for each of several layers is one with their left factors as blocks on a diagonal,

    [U₁ D₁]   [U₁  0 ] [D₁]
    [U₂ D₂] = [0   U₂] [D₂],

which is taken apart again where it is found: directions that a layer has only zeros for are none of its own. Where the
right factors are the same, the left ones are put one on another instead, and the rank stays as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.adapters.base import Change, Difference, Product, Slot
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.full import Full
from tuner.weights.adapters.generalized import Generalized
from tuner.weights.adapters.hadamard import Hadamard
from tuner.weights.adapters.kronecker import Factor, Kronecker
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.adapters.replacement import Replacement
from tuner.weights.adapters.rescaling import Rescaling
from tuner.weights.adapters.rotation import Rotation
from tuner.weights.layouts.modules import Rows

REMEDY = "bake it into its base, and extract a LoRA"
RESIZE = "make LoRAs of them by `tuner resize`"


@dataclass(frozen=True)
class Cut(Difference):
    """Some rows of a difference that does not come apart."""

    whole: Difference
    start: int
    stop: int
    slot: Slot = "weight"

    flattened = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Of these rows."""
        return (self.stop - self.start, *self.whole.shape[1:])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of what is added, float32."""
        return self.whole.rows(self.start + start, self.start + stop)

    def dense(self) -> Tensor:
        """All that is added, float64."""
        return self.whole.dense()[self.start : self.stop]


def apart(change: Change, rows: Sequence[Rows]) -> dict[str, Change]:
    """What a change of a layer does to each module whose `rows` it has, by the module; not those that it leaves alone.

    Raises:
        DataError: the layer has another number of rows, or the change does not come apart.
    """
    sizes = [own.stop - own.start for own in rows]
    if len({own.module for own in rows}) == len(rows):
        found = zip(rows, split(change, sizes), strict=True)
        return {own.module: part for own, part in found if part is not None}
    order = sorted(range(len(rows)), key=lambda index: rows[index].start)
    bounds = [0, *accumulate(sizes)]
    pieces = [take(change, bounds[index], bounds[index + 1]) for index in order]
    return {rows[0].module: join(pieces, [sizes[index] for index in order])}


def together(changes: Mapping[str, Change], rows: Sequence[Rows]) -> Change:
    """The change of a layer that has `rows` of modules, from theirs; some may be left alone, not all.

    Raises:
        DataError: they are of several kinds, or of one that cannot be put together.
    """
    once = len({own.module for own in rows}) == len(rows)
    parts: list[Change | None] = []
    for own in rows:
        change = changes.get(own.module)
        if change is not None and once and change.shape[0] not in (0, own.stop):
            raise DataError(f"{own.module}: for {change.shape[0]} rows, and it has {own.stop}")
        parts.append(change if once or change is None else take(change, own.start, own.stop))
    return join(parts, [own.stop - own.start for own in rows])


def split(change: Change, sizes: Sequence[int]) -> list[Change | None]:
    """What a change does to the layers of `sizes` rows that one layer is made of; None for one that it leaves alone.

    Raises:
        DataError: the layer has another number of rows, or the change does not come apart.
    """
    rows = change.shape[0]
    if rows not in (0, sum(sizes)):
        raise DataError(f"for {rows} rows, and the layer has {sum(sizes)}")
    bounds = [0, *accumulate(sizes)]
    if isinstance(change, Kronecker) and any(bound % change.second.shape[0] for bound in bounds):
        return [Cut(change, *ends) for ends in pairwise(bounds)]
    parts: list[Change | None] = [take(change, *ends) for ends in pairwise(bounds)]
    products = [_left(part) for part in parts if part is not None]
    if len(parts) == 1 or any(lefts is None for lefts in products):
        return parts
    used = [torch.stack([left.any(0) for left in lefts]) for lefts in zip(*products, strict=True) if lefts]  # pyright: ignore
    if any((own.sum(0) > 1).any() for own in used):
        return parts
    return [_own(part, [own[index] for own in used]) if part is not None else None for index, part in enumerate(parts)]


def take(change: Change, start: int, stop: int) -> Change:
    """What a change does to the rows from `start` to `stop`.

    Raises:
        DataError: that depends on other rows.
    """
    whole = (start, stop) == (0, change.shape[0])
    match change:
        case _ if whole:
            return change
        case LowRank(product):
            return replace(change, product=_take(product, start, stop))
        case Hadamard(first, second):
            return replace(change, first=_take(first, start, stop), second=_take(second, start, stop))
        case Kronecker(first, second):
            rows = second.shape[0]
            if start % rows or stop % rows:
                return Cut(change, start, stop)
            return replace(change, first=_take(first, start // rows, stop // rows))
        case Cut(inner, first):
            return Cut(inner, first + start, first + stop)
        case Full(values):
            return replace(change, values=values[start:stop])
        case Replacement(values):
            return replace(change, values=values[start:stop])
        case Generalized(added=added):
            return replace(change, added=_take(added, start, stop))
        case Decomposed(inner, magnitude) if change.per_output:
            part = take(inner, start, stop)
            assert isinstance(part, Difference)
            return Decomposed(part, magnitude[start:stop], change.slot)
        case Rescaling(values, of_inputs):
            return change if of_inputs else replace(change, values=values.flatten()[start:stop])
        case Rotation() if (start % change.size, stop % change.size) == (0, 0):
            return change.rows_from(start, stop)
        case _:
            raise DataError(f"a {type(change).__name__.lower()} does not come apart by rows; {REMEDY}")


def join(parts: Sequence[Change | None], sizes: Sequence[int]) -> Change:
    """The change of one layer that does to its parts of `sizes` rows what `parts` do; None leaves a part alone.

    Raises:
        DataError: they are of several kinds, or of one that cannot be put together.
    """
    there = [part for part in parts if part is not None]
    first = there[0]
    if len(parts) == 1:
        return first
    kinds = {type(part) for part in there}
    if len(kinds) > 1:
        names = " and ".join(sorted(kind.__name__.lower() for kind in kinds))
        raise DataError(f"a {names} are parts of one layer, and cannot be one; {RESIZE}")
    match first:
        case LowRank():
            product, scale = _joined([(p.product, p.scale) if isinstance(p, LowRank) else None for p in parts], sizes)
            return replace(first, product=product, scale=scale)
        case Hadamard():
            own = [part if isinstance(part, Hadamard) else None for part in parts]
            one, scale = _joined([p and (p.first, p.scale) for p in own], sizes)
            other, _ = _joined([p and (p.second, 1.0) for p in own], sizes)
            if one.rank != other.rank:  # the two factors of a LoHa have one rank
                one, scale = _joined([p and (p.first, p.scale) for p in own], sizes, shared=False)
                other, _ = _joined([p and (p.second, 1.0) for p in own], sizes, shared=False)
            return replace(first, first=one, second=other, scale=scale)
        case Kronecker():
            return _kronecker([part if isinstance(part, Kronecker) else None for part in parts], sizes)
        case Cut():
            return _whole([part if isinstance(part, Cut) else None for part in parts], sizes)
        case Full() | Replacement():
            values = [_values(part, first, size) for part, size in zip(parts, sizes, strict=True)]
            return replace(first, values=torch.cat(values))
        case Rescaling() if first.of_inputs:
            same = len(there) == len(parts) and all(
                isinstance(part, Rescaling) and part.of_inputs and torch.equal(part.factors, first.factors)
                for part in there
            )
            if same:
                return first
        case Rescaling():
            own = [part for part in there if isinstance(part, Rescaling)]
            if all((part.of_inputs, part.offset) == (False, first.offset) for part in own):
                values = [
                    part.values.flatten()
                    if isinstance(part, Rescaling)
                    else first.values.new_full((size,), 1 - first.offset)
                    for part, size in zip(parts, sizes, strict=True)
                ]
                return replace(first, values=torch.cat(values))
        case Decomposed() if len(there) == len(parts):
            own = [part for part in parts if isinstance(part, Decomposed)]
            if all(part.per_output for part in own):
                inner = join([part.inner for part in own], sizes)
                assert isinstance(inner, Difference)
                return Decomposed(inner, torch.cat([part.magnitude.flatten() for part in own]), first.slot)
        case Rotation() if len(there) == len(parts):
            own = [part for part in parts if isinstance(part, Rotation)]
            if len({part.size for part in own}) == 1 and len({part.rescale is None for part in own}) == 1:
                return Rotation.stacked(own)
        case Generalized() if len(there) == len(parts):
            own = [part for part in parts if isinstance(part, Generalized)]
            if all(_equal(part.inside, first.inside) for part in own):
                added, scale = _joined([(part.added, part.scale) for part in own], sizes)
                if scale == first.scale and added.rank == first.added.rank:
                    return replace(first, added=added)
        case _:
            pass
    raise DataError(
        f"a {type(first).__name__.lower()} of one of the layers that are one in single files does not make one of the "
        f"whole; {REMEDY}"
    )


def _take(factor: Factor, start: int, stop: int) -> Any:
    return factor[start:stop] if isinstance(factor, Tensor) else replace(factor, left=factor.left[start:stop])


def _left(change: Change | None) -> list[Tensor] | None:
    """The left factors, whose zeros say which directions are none of a layer's own; None where there are none."""
    inner = change.inner if isinstance(change, Decomposed) else change
    match inner:
        case LowRank(product):
            return [product.left]
        case Hadamard(first, second):
            return [first.left, second.left]
        case _:
            return None


def _own(change: Change, used: Sequence[Tensor]) -> Change | None:
    """The change with the directions of `used` alone; None where none is left."""
    if isinstance(change, Decomposed):
        inner = _own(change.inner, used)
        return replace(change, inner=inner) if isinstance(inner, Difference) else change
    if not all(own.any() for own in used):
        return None
    match change:
        case LowRank(product, scale):
            kept = _kept(product, used[0])
            return replace(change, product=kept, scale=scale)
        case Hadamard(first, second) if int(used[0].sum()) == int(used[1].sum()):
            return replace(change, first=_kept(first, used[0]), second=_kept(second, used[1]))
        case _:
            return change


def _kept(product: Product, used: Tensor) -> Product:
    """The product of those directions."""
    core = product.core
    right = product.right if core is not None else product.right[used]
    return Product(product.left[:, used], right, None if core is None else core[used])


def _joined(
    parts: Sequence[tuple[Product, float] | None], sizes: Sequence[int], shared: bool = True
) -> tuple[Product, float]:
    """Products one on another as one, and what it is to be multiplied by."""
    there = [part for part in parts if part is not None]
    (first, scale) = there[0]
    lefts = [_scaled(part[0].left, part[1] / scale) if part is not None else None for part in parts]
    if shared and all(_equal(product, first) for product, _ in there):
        own = [
            left if left is not None else first.left.new_zeros(size, first.rank)
            for left, size in zip(lefts, sizes, strict=True)
        ]
        return Product(_cat(own), first.right, first.core), scale
    if any(product.core is not None for product, _ in there):
        raise DataError(f"layers with a third factor do not make one; {REMEDY}")
    if len({product.right.shape[1:] for product, _ in there}) > 1:
        raise DataError("layers that are one in single files have inputs of different sizes")
    found = [left for left in lefts if left is not None]
    ranks = [left.shape[1] for left in found]
    dtype = _cat([left[:0].flatten() for left in found]).dtype
    left = torch.zeros(sum(sizes), sum(ranks), dtype=dtype)
    row = column = 0
    for own, size in zip(lefts, sizes, strict=True):
        if own is not None:
            left[row : row + size, column : column + own.shape[1]] = own
            column += own.shape[1]
        row += size
    return Product(left, _cat([product.right for product, _ in there])), scale


def _scaled(left: Tensor, factor: float) -> Tensor:
    """`left` times a number, in its dtype where nothing is rounded by that, else in float32."""
    if factor == 1:
        return left
    wide = left.float() * factor
    return wide.to(left.dtype) if torch.equal(wide.to(left.dtype).float(), wide) else wide


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """One on another, in the widest of their dtypes."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.to(dtype) for tensor in tensors])


def _equal(one: Product, other: Product) -> bool:
    """Whether two products have the same right factors."""
    cores = one.core is other.core or (
        one.core is not None and other.core is not None and torch.equal(one.core, other.core)
    )
    same = one.right is other.right or (one.right.shape == other.right.shape and torch.equal(one.right, other.right))
    return cores and same


def _kronecker(parts: Sequence[Kronecker | None], sizes: Sequence[int]) -> Kronecker:
    """w₁ of one on that of another, where w₂ is the same."""
    first = next(part for part in parts if part is not None)
    rows, columns = first.second.shape[0], first.first.shape[1]
    products = [part.first for part in parts if part is not None and isinstance(part.first, Product)]
    alike = all(part is not None and _alike(part, first) for part in parts)
    if alike and len(products) == len(parts) and all(_equal(own, products[0]) for own in products):
        return replace(first, first=replace(products[0], left=_cat([own.left for own in products])))
    factors: list[Tensor] = []
    for part, size in zip(parts, sizes, strict=True):
        if part is None and size % rows == 0 and isinstance(first.first, Tensor):
            factors.append(first.first.new_zeros(size // rows, columns))
        elif part is not None and isinstance(part.first, Tensor) and _alike(part, first):
            factors.append(part.first)
        else:
            raise DataError(f"LoKrs of layers that are one in single files do not make one; {RESIZE}")
    return replace(first, first=_cat(factors))


def _alike(one: Kronecker, other: Kronecker) -> bool:
    """Whether two differ in their first factors alone."""
    match one.second, other.second:
        case Tensor(), Tensor():
            same = one.second is other.second or torch.equal(one.second, other.second)
        case Product(), Product():
            same = _equal(one.second, other.second) and torch.equal(one.second.left, other.second.left)
        case _:
            same = False
    return same and one.scale == other.scale and one.first.shape[1] == other.first.shape[1]


def _whole(parts: Sequence[Cut | None], sizes: Sequence[int]) -> Difference:
    """What rows were cut from, when all of it is there in order."""
    bounds = [0, *accumulate(sizes)]
    first = next(part for part in parts if part is not None)
    for part, ends in zip(parts, pairwise(bounds), strict=True):
        if part is None or part.whole is not first.whole or (part.start, part.stop) != ends:
            raise DataError(f"parts of a LoKr do not make a whole one; {RESIZE}")
    return first.whole


def _values(part: Change | None, first: Full | Replacement, size: int) -> Tensor:
    if isinstance(part, Full | Replacement):
        return part.values
    if isinstance(first, Replacement):
        raise DataError(f"only some of the layers that are one in single files are replaced; {REMEDY}")
    return first.values.new_zeros(size, *first.values.shape[1:])
