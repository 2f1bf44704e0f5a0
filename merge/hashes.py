"""Hashing while bytes are at hand: every tensor that a merge reads or writes, by many workers, in any order."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge.content import CELL, TensorHash, digest, root, root_of
from merge.output import BLOCK
from merge.plan import Plan
from merge.read import Files
from tuner.weights.store import TensorMeta


class Cells(ABC):
    """What is read and written, cut into cells; those of which parts come one by one are put together."""

    def __init__(self) -> None:
        self._edges: dict[tuple[str, int], tuple[int, bytearray]] = {}
        """Cells of which a part is there: how much, and the part at its place."""
        self._spare: list[bytearray] = []
        """Memory that held such cells."""
        self._lock = threading.Lock()

    @abstractmethod
    def read(self, source: int, name: str, cell: int, data: bytes | memoryview) -> None:
        """The bytes of a cell of a source's tensor."""

    @abstractmethod
    def made(self, name: str, cell: int, data: memoryview) -> None:
        """The bytes of a cell of an output tensor."""

    def written(self, name: str, meta: TensorMeta, start: int, data: memoryview) -> None:
        """Bytes of an output tensor from `start` on."""
        stop = start + len(data)
        at = start
        while at < stop:
            cell = at // CELL
            first, last = cell * CELL, min((cell + 1) * CELL, meta.bytes)
            piece = data[at - start : min(last, stop) - start]
            if at == first and len(piece) == last - first:
                self.made(name, cell, piece)
            else:
                self.edge(name, cell, at - first, piece, last - first)
            at += len(piece)

    def edge(self, name: str, cell: int, at: int, piece: memoryview, size: int) -> None:
        """A part of a cell that two blocks share: whichever comes first is kept until the other comes."""
        with self._lock:
            known, whole = self._edges.pop((name, cell), (0, None))
            if whole is None:
                whole = self._spare.pop() if self._spare else bytearray(CELL)
            memoryview(whole)[at : at + len(piece)] = piece  # a bytearray itself would make a copy first
            known += len(piece)
            if known < size:
                self._edges[name, cell] = known, whole
            else:
                self.made(name, cell, memoryview(whole)[:size])
                self._spare.append(whole)


@dataclass(frozen=True)
class Digests:
    """What one process found of some blocks, for the one that has all digests."""

    cells: Sequence[tuple[int | None, str, int, bytes]]
    """The source, or None for the output; the tensor's name; the cell and its digest."""
    pieces: Sequence[tuple[str, int, bytes]]
    """Of cells that go on in other blocks than those: the tensor's name, where the piece begins, and its bytes."""


class Hashes(Cells):
    """The digests of all tensors read and written."""

    def __init__(self, plan: Plan, files: Files) -> None:
        super().__init__()
        self.plan = plan
        self.output = {entry.name: TensorHash(entry.meta) for entry in plan.entries}
        self.inputs: list[dict[str, TensorHash]] = [{} for _ in plan.sources]
        for entry in plan.entries:
            for leaf in entry.program.leaves:
                if leaf.source is not None:
                    place = files.place(leaf.source, entry.name)
                    if place is not None:
                        self.inputs[leaf.source].setdefault(entry.name, TensorHash(place.meta))

    def read(self, source: int, name: str, cell: int, data: bytes | memoryview) -> None:
        self.inputs[source][name].update(cell, digest(data))

    def made(self, name: str, cell: int, data: memoryview) -> None:
        self.output[name].update(cell, digest(data))

    def take_over(self, digests: Digests) -> None:
        """What another process has found."""
        for source, name, cell, found in digests.cells:
            (self.output if source is None else self.inputs[source])[name].update(cell, found)
        for name, start, data in digests.pieces:
            self.written(name, self.output[name].meta, start, memoryview(data))

    def dump(self) -> dict[str, str]:
        """All digests so far, for the journal."""
        digests = {f"out/{name}": hashes.digests.hex() for name, hashes in self.output.items()}
        for index, tensors in enumerate(self.inputs):
            digests |= {f"{index}/{name}": hashes.digests.hex() for name, hashes in tensors.items()}
        return digests

    def restore(self, digests: Mapping[str, str]) -> None:
        """Take over what a journal says."""
        for name, hashes in self.output.items():
            hashes.digests[:] = bytes.fromhex(digests[f"out/{name}"])
        for index, tensors in enumerate(self.inputs):
            for name, hashes in tensors.items():
                hashes.digests[:] = bytes.fromhex(digests[f"{index}/{name}"])

    def roots(self) -> tuple[str, tuple[str, ...]]:
        """The content hashes of the output and of what was read of each source."""
        inputs: list[str] = []
        for source, tensors in zip(self.plan.sources, self.inputs, strict=True):
            if source.origin is not None:
                inputs.append(root_of(source.origin, source.origin.metas))
                continue
            digests = {name: hashes.digest() for name, hashes in tensors.items()}
            inputs.append(root(source.store.metas, digests))
        output = {name: hashes.digest() for name, hashes in self.output.items()}
        return root(self.plan.metas, output), tuple(inputs)  # a folder's names are those of all its parts


class ShiftHashes(Cells):
    """The digests of neighbouring blocks, for the process that has all."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan
        self.begin(range(0))

    def begin(self, blocks: range) -> None:
        """From now on it is about these."""
        self._bytes = range(blocks.start * BLOCK, blocks.stop * BLOCK)
        self._cells: list[tuple[int | None, str, int, bytes]] = []
        self._pieces: list[tuple[str, int, bytes]] = []
        self._edges.clear()

    def read(self, source: int, name: str, cell: int, data: bytes | memoryview) -> None:
        self._cells.append((source, name, cell, digest(data)))

    def made(self, name: str, cell: int, data: memoryview) -> None:
        self._cells.append((None, name, cell, digest(data)))

    def edge(self, name: str, cell: int, at: int, piece: memoryview, size: int) -> None:
        first = self._plan.entries[self._plan.numbers[name]].offset + cell * CELL
        if first in self._bytes and first + size - 1 in self._bytes:
            super().edge(name, cell, at, piece, size)
        else:
            self._pieces.append((name, cell * CELL + at, bytes(piece)))

    def found(self) -> Digests:
        """All of them."""
        return Digests(self._cells, self._pieces)
