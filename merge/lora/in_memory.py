"""Merge methods on tensors that are held in memory, such as a layer of a few LoRAs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.methods.base import GRID, Elementwise, Fitted, Merge, MergeMethod, Whole


def apply(method: MergeMethod, name: str, tensors: Sequence[Tensor]) -> Tensor:
    """What `method` makes of tensors in memory, of their shape and dtype."""
    if isinstance(method, Whole):
        return method.compute(tensors)
    inputs = InMemory(name, tensors)
    result = torch.empty_like(tensors[0]).reshape(-1)
    merge: Merge | None = method.fit(inputs) if isinstance(method, Fitted) else None
    for start in range(0, result.numel(), GRID):
        pieces = [tensor.reshape(-1)[start : start + GRID] for tensor in tensors]
        out = result[start : start + GRID]
        if merge is not None:
            merge(pieces, out, start)
        else:
            assert isinstance(method, Elementwise)
            method.merge(pieces, out)
    return result.reshape(tensors[0].shape)


@dataclass(frozen=True)
class InMemory:
    """Tensors that are held, as the inputs of a fitted method (`merge.methods.base.Tensors`)."""

    name: str
    tensors: Sequence[Tensor]

    @property
    def inputs(self) -> int:
        """How many there are."""
        return len(self.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each."""
        return tuple(self.tensors[0].shape)

    @property
    def elements(self) -> int:
        """How many numbers each has."""
        return self.tensors[0].numel()

    def chunks(self, start: int = 0) -> Iterator[tuple[int, list[Tensor]]]:
        """All inputs from `start` on, run by run."""
        for at in range(start, self.elements, GRID):
            yield at, [tensor.reshape(-1)[at : at + GRID] for tensor in self.tensors]

    def look(self, places: Sequence[int], length: int) -> list[Tensor]:
        """All inputs at some places."""
        flat = [tensor.reshape(-1) for tensor in self.tensors]
        return [torch.cat([tensor[place : place + length] for place in places]) for tensor in flat]

    def whole(self, index: int) -> Tensor:
        """Input `index` in its shape."""
        return self.tensors[index].clone()
