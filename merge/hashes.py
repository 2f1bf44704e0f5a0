"""Hashing while bytes are at hand: every tensor that a merge reads or writes, by many threads, in any order."""

import threading
from collections.abc import Mapping

from merge.content import CELL, TensorHash, root, root_of
from merge.plan import Plan
from merge.read import Files
from tuner.weights.store import TensorMeta


class Hashes:
    """The digests of all tensors read and written."""

    def __init__(self, plan: Plan, files: Files) -> None:
        self.plan = plan
        self.output = {entry.name: TensorHash(entry.meta) for entry in plan.entries}
        self.inputs: list[dict[str, TensorHash]] = [{} for _ in plan.sources]
        for entry in plan.entries:
            for leaf in entry.program.leaves:
                if leaf.source is not None:
                    place = files.place(leaf.source, entry.name)
                    if place is not None:
                        self.inputs[leaf.source].setdefault(entry.name, TensorHash(place.meta))
        self._edges: dict[tuple[str, int], tuple[int, bytearray]] = {}
        """Cells of which a part is there: how much, and the part at its place."""
        self._spare: list[bytearray] = []
        """Memory that held such cells."""
        self._lock = threading.Lock()

    def written(self, name: str, meta: TensorMeta, start: int, data: memoryview) -> None:
        """Bytes of an output tensor from `start` on."""
        stop = start + len(data)
        at = start
        while at < stop:
            cell = at // CELL
            first, last = cell * CELL, min((cell + 1) * CELL, meta.bytes)
            piece = data[at - start : min(last, stop) - start]
            if at == first and len(piece) == last - first:
                self.output[name].update(cell, piece)
            else:
                self._edge(name, cell, at - first, piece, last - first)
            at += len(piece)

    def _edge(self, name: str, cell: int, at: int, piece: memoryview, size: int) -> None:
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
                self.output[name].update(cell, memoryview(whole)[:size])
                self._spare.append(whole)

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
