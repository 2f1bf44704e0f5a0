"""Tensors of several stores side by side, in float64 and a run at a time, so that memory stays small for any size."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from merge.methods.base import GRID
from merge.read import Files
from merge.recipe import Source
from tuner.weights.store import TensorStore


class Runs:
    """Stores opened for reading; a context manager."""

    def __init__(self, stores: Sequence[TensorStore]) -> None:
        self._stores = stores
        self._files = Files([Source(str(index), store) for index, store in enumerate(stores)])
        self._raw = torch.empty(0, dtype=torch.uint8)
        self._numbers = [torch.empty(0, dtype=torch.float64) for _ in stores]

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def of(self, name: str, limit: int | None = None) -> Iterator[list[Tensor]]:
        """The tensor `name` of every store, flat, in runs of at most `GRID` numbers; the next overwrites them.

        Args:
            name: a tensor of as many numbers in all the stores.
            limit: how many numbers at most, from the first on; None for all.
        """
        total = torch.Size(self._stores[0].metas[name].shape).numel()
        for start in range(0, total if limit is None else min(total, limit), GRID):
            stop = min(start + GRID, total if limit is None else min(total, limit))
            yield [self._read(store, name, start, stop) for store in range(len(self._stores))]

    def _read(self, store: int, name: str, start: int, stop: int) -> Tensor:
        if self._numbers[store].numel() < stop - start:
            self._numbers[store] = torch.empty(stop - start, dtype=torch.float64)
        numbers = self._numbers[store][: stop - start]
        place = self._files.place(store, name)
        if place is None:
            numbers.copy_(self._files.computed(store, name, start, stop))
            return numbers
        size = place.meta.dtype.itemsize
        if self._raw.numel() < (stop - start) * size:
            self._raw = torch.empty((stop - start) * size, dtype=torch.uint8)
        raw = self._raw[: (stop - start) * size]
        self._files.read_bytes(place, start * size, memoryview(raw.numpy()))  # pyright: ignore[reportArgumentType]
        return numbers.copy_(raw.view(place.meta.dtype))
