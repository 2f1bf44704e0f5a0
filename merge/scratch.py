"""Memory for what is needed for a moment: taken and given back in turn, so that there is never more than is in use.

What is asked of the C library anew for every run of numbers lies scattered, and takes up to three times what is used.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from merge.allocator import private

ROOM = 256 << 20
"""Bytes that a thread may use; those it never does take no memory. For more, the C library is asked."""
ALIGNED = 64


class _Stack(threading.local):
    """A thread's memory, and how much of it is in use."""

    def __init__(self) -> None:
        self.memory = torch.frombuffer(private(ROOM), dtype=torch.uint8)
        self.used = 0


_stack = _Stack()


@contextlib.contextmanager
def scratch(
    like: Tensor, count: int = 1, dtype: torch.dtype | None = None, length: int | None = None
) -> Iterator[list[Tensor]]:
    """Lend `count` flat tensors on the device of `like`, and of its length and dtype if no other is asked for.

    They hold anything, and are given back at the end: what is lent last is given back first.
    """
    dtype, length = dtype or like.dtype, like.numel() if length is None else length
    size = -(-length * dtype.itemsize // ALIGNED) * ALIGNED
    before = _stack.used
    if like.device.type != "cpu" or before + count * size > ROOM:
        yield [torch.empty(length, dtype=dtype, device=like.device) for _ in range(count)]
        return
    _stack.used += count * size
    starts = range(before, _stack.used, size) if size else [before] * count
    try:
        yield [_stack.memory[at : at + length * dtype.itemsize].view(dtype) for at in starts]
    finally:
        _stack.used = before
