"""A LoRA with fewer directions: those that hold most of it, found exactly."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from merge.lora.decomposition import Decomposition, decompose, decompose_product
from merge.lora.extract import NAME_BYTES, Part, bytes_of, header_bytes, layer_of, overall, refuse_padding
from merge.lora.ranks.base import RankRule
from tuner.errors import DataError
from tuner.weights.adapters.base import Change, Difference
from tuner.weights.adapters.decomposed import Decomposed
from tuner.weights.adapters.file import Adapters
from tuner.weights.adapters.full import Full
from tuner.weights.adapters.low_rank import LowRank

Shapes = Mapping[str, tuple[int, ...]]
"""Of the network's tensors, by name."""


@dataclass(frozen=True)
class Resized:
    """A LoRA and what it lost."""

    adapters: Adapters
    parts: tuple[Part, ...]

    @property
    def error(self) -> float:
        """‖ΔW - kept‖ / ‖ΔW‖ over all layers together."""
        return overall(self.parts)


def resize(
    adapters: Adapters, rule: RankRule, *, dtype: torch.dtype = torch.float16, shapes: Shapes | None = None
) -> Resized:
    """The LoRA with the directions of each layer that `rule` chooses.

    LoHa and LoKr become LoRA. A layer that would keep as many as it has stays as it is, to the bit. What is kept as a
    whole difference stays so. In a DoRA it is the difference inside that is resized; its magnitudes stay.

    Args:
        adapters: of any kinds that add something.
        rule: how many directions of each layer are kept.
        dtype: what the file will have, for rules that count bytes.
        shapes: the network's, without which a LoHa or LoKr does not tell a convolution from a linear layer.

    Raises:
        DataError: a kind without a rank, a layer of unknown shape, or a rule that keeps nothing.
    """
    refuse_padding(rule, adapters.dialect, adapters.changes)
    whole: dict[str, Full] = {}
    inner: dict[str, Difference] = {}
    for name, change in adapters.changes.items():
        match change:
            case Full():
                whole[name] = change
            case Difference():
                inner[name] = change
            case Decomposed(difference) if not isinstance(difference, Full):
                inner[name] = difference
            case _:
                raise DataError(f"{name}: a {type(change).__name__.lower()} has no rank; bake it into its base")
    sizes = {name: shape_of(name, change, shapes) for name, change in inner.items()}
    found = {name: decomposed(change) for name, change in inner.items()}
    layers = {name: layer_of(name, one, sizes[name], dtype) for name, one in found.items()}
    for name, layer in layers.items():
        if isinstance(change := adapters.changes[name], Decomposed):
            magnitude = change.magnitude.numel() * 4 + len(name) + NAME_BYTES
            layers[name] = replace(layer, bytes_once=layer.bytes_once + magnitude)
    ranks = rule.choose(layers, header_bytes(adapters.metadata) + bytes_of(whole, dtype))
    changes: dict[str, Change] = {}
    parts: list[Part] = []
    for name, change in adapters.changes.items():
        if name in whole:
            changes[name] = change
            continue
        one, rank, own = found[name], ranks[name], inner[name]
        parts.append(Part(name, rank, one.total**0.5, one.error(rank)))
        if rank:
            keeps = isinstance(own, LowRank) and rank >= own.rank
            smaller = own if keeps else one.low_rank(rank, sizes[name])
            changes[name] = replace(change, inner=smaller) if isinstance(change, Decomposed) else smaller
    if not changes:
        raise DataError("nothing is left of the LoRA; choose a rule that keeps more")
    return Resized(replace(adapters, changes=changes), tuple(parts))


def decomposed(change: Difference) -> Decomposition:
    """All singular values of what is added, exactly."""
    if isinstance(change, LowRank):
        return decompose_product(*change.factors())
    return decompose(change.dense(), None)


def shape_of(name: str, change: Difference, shapes: Shapes | None) -> tuple[int, ...]:
    """The shape of the weight that is changed.

    Raises:
        DataError: the change alone does not say, or it does not fit.
    """
    if shapes is not None and name in shapes:
        if not change.fits(shapes[name]):
            raise DataError(f"{name}: a change for {list(change.shape)}, and the weight is {list(shapes[name])}")
        return shapes[name]
    if change.flattened and len(change.shape) == 2:
        raise DataError(f"{name}: a linear layer or a convolution, the file does not say which; give its base")
    return change.shape
