"""Several LoRAs as one: their weighted sum, exactly, or what a merge method makes of their differences.

The sum needs no matrix to be formed: U = [w₁ s₁ U₁, w₂ s₂ U₂, …] and D = [D₁; D₂; …] have the product Σ wᵢ sᵢ Uᵢ Dᵢ,
with the strengths sᵢ = alphaᵢ / rankᵢ and weights wᵢ, which occur once and not in both factors. A smaller rank is cut
from that product, not from the factors. Sums of factors, ΣUᵢ ΣDᵢ, have products of each with every other in them, and
are not offered.

Other methods (`merge.methods`) are given the differences themselves, layer by layer, as they are given those of
checkpoints. So their result does not depend on how a LoRA's product is split into factors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merge.blocks import Blocks
from merge.coefficients import check, resolve
from merge.lora.decomposition import Decomposition, decompose, decompose_product
from merge.lora.extract import Part, bytes_of, header_bytes, layer_of, overall, refuse_padding
from merge.lora.in_memory import apply
from merge.lora.ranks.base import RankRule
from merge.lora.resize import Shapes, decomposed, shape_of
from merge.methods.base import MergeMethod, Space
from tuner.errors import ConfigError, DataError
from tuner.weights.adapters.base import Change, Difference, Product
from tuner.weights.adapters.file import SHOWN, Adapters
from tuner.weights.adapters.full import Full
from tuner.weights.adapters.low_rank import LowRank
from tuner.weights.layouts.modules import Dialect


@dataclass(frozen=True)
class Combined:
    """One LoRA, and what it lost to a smaller rank."""

    adapters: Adapters
    parts: tuple[Part, ...] = ()
    """Of the layers whose rank was cut."""

    @property
    def error(self) -> float:
        """‖ΔW - kept‖ / ‖ΔW‖ over all layers that were cut."""
        return overall(self.parts)


def combine(
    loras: Sequence[Adapters],
    weights: Sequence[float],
    *,
    method: MergeMethod | None = None,
    rule: RankRule | None = None,
    dialect: Dialect | None = None,
    dtype: torch.dtype = torch.float16,
    shapes: Shapes | None = None,
    seed: int = 0,
) -> Combined:
    """The LoRAs as one.

    Args:
        loras: with names of one kind; a tensor that some of them leave alone is one that they add nothing to.
        weights: what each is multiplied by, any numbers.
        method: what makes one difference of theirs; None adds them up. It is given the weighted differences.
        rule: how many directions of each layer are kept; None keeps all of a sum.
        dialect: that of the file; the first LoRA's where left out.
        dtype: what the file will have, for rules that count bytes.
        shapes: the network's, which LoHa and LoKr need.
        seed: of the decomposition of what a method makes.

    Raises:
        ConfigError: no weight for each LoRA, a method for checkpoints, or one without a rule.
        DataError: LoRAs for different networks, or kinds that cannot be added up.
    """
    if len(loras) != len(weights) or not loras:
        raise ConfigError(f"weights: {len(weights)} for {len(loras)} LoRAs; give one for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError("weights: must be numbers")
    if method is not None and any(space is Space.WEIGHT for space in method.takes):
        raise ConfigError(f"method: {type(method).__name__} merges checkpoints, not differences; choose another")
    if method is not None and rule is None:
        raise ConfigError("rank: missing; what a method makes of differences has no small rank by itself")
    if rule is not None:
        refuse_padding(rule, dialect or loras[0].dialect, (name for lora in loras for name in lora.changes))
    if method is None:
        loras, weights = _without_zeros(loras, weights)
    groups = _groups(loras, weights, shapes)
    changes: dict[str, Change] = {}
    found: dict[str, Decomposition] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    blocks = Blocks.of(groups)
    if method is not None:
        check(method, groups, blocks, "method")
    for name, (shape, terms) in groups.items():
        if method is not None and rule is not None:
            own = resolve(method, name, blocks)
            merged = _merged(own, name, shape, terms, len(loras))
            if len(shape) == 1:
                changes[name] = _vector(merged, terms)
            else:
                found[name], sizes[name] = decompose(merged, rule.most, seed, name), shape
        elif len(shape) == 1 or all(isinstance(change, Full) for _, _, change in terms):
            changes[name] = _vector(_dense_sum(terms), terms)
        elif rule is None:
            changes[name] = _concatenated(name, shape, terms)
        else:
            found[name], sizes[name] = _sum(terms), shape
    if rule is None:
        return Combined(replace(loras[0], changes=changes, metadata={}))
    vectors = {name: change for name, change in changes.items() if isinstance(change, Full)}
    layers = {name: layer_of(name, one, sizes[name], dtype) for name, one in found.items()}
    ranks = rule.choose(layers, header_bytes(loras[0].metadata) + bytes_of(vectors, dtype))
    parts = tuple(Part(name, ranks[name], one.total**0.5, one.error(ranks[name])) for name, one in found.items())
    kept = {name: one.low_rank(ranks[name], sizes[name]) for name, one in found.items() if ranks[name]}
    everything = {name: kept.get(name, changes.get(name)) for name in groups}
    changes = {name: change for name, change in everything.items() if change is not None}
    if not changes:
        raise DataError("nothing is left of the LoRAs; choose a rule that keeps more")
    return Combined(replace(loras[0], changes=changes, metadata={}), parts)


def _without_zeros(loras: Sequence[Adapters], weights: Sequence[float]) -> tuple[list[Adapters], list[float]]:
    """Those LoRAs that a sum has anything of."""
    counted = [(lora, weight) for lora, weight in zip(loras, weights, strict=True) if weight]
    if not counted:
        raise ConfigError("weights: all of them are 0")
    return [lora for lora, _ in counted], [weight for _, weight in counted]


Term = tuple[int, float, Difference]
"""Which LoRA it is of, its weight, and what it adds."""


def _groups(
    loras: Sequence[Adapters], weights: Sequence[float], shapes: Shapes | None
) -> dict[str, tuple[tuple[int, ...], list[Term]]]:
    """For each tensor: its shape, and what the LoRAs add to it."""
    kinds = {(lora.resolved, None if lora.resolved else lora.dialect) for lora in loras}
    if len(kinds) > 1:
        raise DataError("the LoRAs' files spell names in different ways; give their base")
    terms: dict[str, list[Term]] = {}
    for index, (lora, weight) in enumerate(zip(loras, weights, strict=True)):
        other = [name for name, change in lora.changes.items() if not isinstance(change, Difference)]
        if other:
            more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
            kind = type(lora.changes[other[0]]).__name__.lower()
            raise DataError(
                f"LoRA {index + 1}: {', '.join(other[:SHOWN])}{more}: a {kind} depends on the weights that it is "
                "applied to, and cannot be added up; bake it into its base, and extract a LoRA"
            )
        for name, change in lora.changes.items():
            assert isinstance(change, Difference)
            terms.setdefault(name, []).append((index, weight, change))
    groups: dict[str, tuple[tuple[int, ...], list[Term]]] = {}
    for name, own in sorted(terms.items()):
        known = [change for _, _, change in own if not (change.flattened and len(change.shape) == 2)]
        shape = shape_of(name, (known or [own[0][2]])[0], shapes)
        for index, _, change in own:
            if not change.fits(shape):
                raise DataError(
                    f"LoRA {index + 1}: {name}: for a weight of {list(change.shape)}, and another is for "
                    f"{list(shape)}; they were made for different models"
                )
        groups[name] = (shape, own)
    return groups


def _concatenated(name: str, shape: tuple[int, ...], terms: Sequence[Term]) -> LowRank:
    """The sum as one product, float32: the ranks add up.

    Each product's strength and weight go into its factors, the sign into the left one, so that both are of about one
    size: in half precision a small one would lose digits.
    """
    left: list[Tensor] = []
    right: list[Tensor] = []
    for _, weight, change in terms:
        if not isinstance(change, LowRank):
            raise DataError(
                f"{name}: a {type(change).__name__.lower()} has no factors to be put beside others; give a rank"
            )
        own_left, own_right = change.product.double()
        own_left = weight * change.scale * own_left
        sizes = own_left.square().mean().item(), own_right.square().mean().item()
        factor = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 4) if all(sizes) else 1.0
        left.append(factor * own_left)
        right.append(own_right / factor)
    columns = torch.cat(right).float()
    return LowRank(Product(torch.cat(left, 1).float(), columns.reshape(-1, *shape[1:])), 1.0)


def _sum(terms: Sequence[Term]) -> Decomposition:
    """The singular values of the sum: from the factors where all have some, else of the dense matrix."""
    if all(isinstance(change, LowRank) for _, _, change in terms):
        pairs = [(weight, change.factors()) for _, weight, change in terms if isinstance(change, LowRank)]
        left = torch.cat([weight * factors[0] for weight, factors in pairs], 1)
        return decompose_product(left, torch.cat([factors[1] for _, factors in pairs]))
    if len(terms) == 1:
        one = decomposed(terms[0][2])
        weight = terms[0][1]
        return replace(one, left=math.copysign(1, weight) * one.left, values=abs(weight) * one.values)
    return decompose(_dense_sum(terms), None)


def _dense_sum(terms: Sequence[Term]) -> Tensor:
    """The sum as a matrix, float64."""
    _, first, change = terms[0]
    dense = first * change.dense()
    for _, weight, other in terms[1:]:
        dense += weight * other.dense().reshape(dense.shape)
    return dense


def _merged(method: MergeMethod, name: str, shape: tuple[int, ...], terms: Sequence[Term], count: int) -> Tensor:
    """What a method makes of the weighted differences, float64, as a matrix; LoRAs without any give zeros."""
    rows = shape[0]
    tensors = [torch.zeros(shape, dtype=torch.float64) for _ in range(count)]
    for index, weight, change in terms:
        tensors[index] += weight * change.dense().reshape(shape)
    inputs = len(method.takes)
    if count < inputs or (count > inputs and not method.repeats):
        raise ConfigError(f"method: {type(method).__name__} takes {inputs} differences, got {count}")
    return apply(method, name, tensors).reshape(rows, -1)


def _vector(values: Tensor, terms: Sequence[Term]) -> Full:
    """A difference that is kept whole, in the shape and place of the first."""
    first = terms[0][2]
    assert isinstance(first, Full)
    return Full(values.reshape(first.shape).float(), first.slot, first.norm)
