"""Merge methods driven in memory, as strictly as the executor may: buffers are used again, nothing may change."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from merge.methods.base import GRID, Elementwise, Fitted, Merge, MergeMethod, Tensors


class InMemory:
    """Tensors of one shape and dtype as the inputs of a fitted method; see `merge.methods.base.Tensors`."""

    def __init__(self, tensors: Sequence[Tensor], name: str = "weight", run: int | None = None) -> None:
        self.name = name
        self.run = run or GRID
        self.passes = 0
        """How many were begun."""
        self.tensors = [tensor.contiguous() for tensor in tensors]
        self.shape = tuple(tensors[0].shape)
        self.inputs = len(tensors)
        self.elements = tensors[0].numel()

    def chunks(self, start: int = 0) -> Iterator[tuple[int, list[Tensor]]]:
        """Runs of `run` numbers, in buffers that the next run overwrites."""
        assert start % self.run == 0, "a pass begins where a run does"
        self.passes += 1
        buffers = [tensor.new_empty(min(self.run, self.elements)) for tensor in self.tensors]
        for at in range(start, self.elements, self.run):
            runs = [tensor.reshape(-1)[at : at + self.run] for tensor in self.tensors]
            lent = [buffer[: run.numel()].copy_(run) for buffer, run in zip(buffers, runs, strict=True)]
            yield at, lent
            assert all(same_bits(a, b) for a, b in zip(lent, runs, strict=True)), "fit changed its inputs"
            for buffer in buffers:
                buffer.fill_(torch.nan)  # what is kept of a run is worth nothing

    def look(self, places: Sequence[int], length: int) -> list[Tensor]:
        """Numbers from some places on."""
        assert len(places) * length <= GRID and all(0 <= place <= self.elements - length for place in places)
        flat = [tensor.reshape(-1) for tensor in self.tensors]
        return [torch.cat([tensor[place : place + length] for place in places]) for tensor in flat]

    def whole(self, index: int) -> Tensor:
        """A copy, in its shape."""
        return self.tensors[index].clone()


def apply(
    method: MergeMethod,
    *tensors: Tensor,
    dtype: torch.dtype = torch.float32,
    runs: Sequence[int] | None = None,
    name: str = "weight",
) -> Tensor:
    """What `method` makes of `tensors`, in their shape.

    Args:
        dtype: what the tensors are turned into first, as the executor does.
        runs: the lengths of the runs in which it is worked out; None: all at once.
        name: the tensor's name, from which fitted methods may take their randomness.

    The method is held to its contract: it writes every number of `out`, and changes no input.
    """
    inputs = [tensor.detach().to(dtype).contiguous() for tensor in tensors]
    assert len({tensor.shape for tensor in inputs}) == 1, "inputs have one shape"
    flat = [tensor.reshape(-1) for tensor in inputs]
    runs = [flat[0].numel()] if runs is None else runs
    assert sum(runs) == flat[0].numel(), "the runs add up to the tensor"
    merge = _merge(method, InMemory(inputs, name))
    result = flat[0].new_full((flat[0].numel(),), UNWRITTEN)
    start = 0
    for length in runs:
        pieces = [tensor[start : start + length].clone() for tensor in flat]
        out = result[start : start + length]
        merge(pieces, out, start)
        for piece, tensor in zip(pieces, flat, strict=True):
            assert same_bits(piece, tensor[start : start + length]), "merge changed an input"
        start += length
    assert not (result == UNWRITTEN).any(), "merge left a number of `out` unwritten"
    return result.reshape(inputs[0].shape)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same bits: -0 is not 0, and a NaN is itself."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(left, right)


UNWRITTEN = -1.2345678e30
"""Stands in `out` before it is written."""


def _merge(method: MergeMethod, tensors: Tensors) -> Merge:
    match method:
        case Fitted():
            return method.fit(tensors)
        case Elementwise():
            return lambda inputs, out, start: method.merge(inputs, out)
        case _:
            raise AssertionError(f"{method} is no merge method")
