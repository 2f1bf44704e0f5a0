"""What a file's tensors are, as a number: the same for the same values, however the file orders or names its parts.

Every tensor is hashed in cells of `CELL` bytes, so that several threads can hash one tensor, each the cells it reads. A
tensor's digest is the hash of its cells' digests; a model's root is the hash of its tensors' names, dtypes, shapes and
digests, sorted by name. Cells use XXH3-128, which finds every accident and costs nothing beside reading; it is no
protection against somebody who wants two files to look the same.
"""

import hashlib
from collections.abc import Iterable, Mapping

import xxhash

from tuner.weights.store import DTYPE_NAMES, TensorMeta, TensorStore

CELL = 1 << 19
"""Bytes of one cell; the last of a tensor may be shorter."""
DIGEST = 16
"""Bytes of a cell's digest."""


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """That of a cell's bytes."""
    return xxhash.xxh3_128_digest(data)


def cells(meta: TensorMeta) -> int:
    """How many cells a tensor has."""
    return -(-meta.bytes // CELL)


class TensorHash:
    """The digest of one tensor, filled cell by cell in any order."""

    def __init__(self, meta: TensorMeta) -> None:
        self.meta = meta
        self.digests = bytearray(DIGEST * cells(meta))

    def update(self, cell: int, found: bytes) -> None:
        """Take in the digest of cell number `cell`."""
        self.digests[cell * DIGEST : (cell + 1) * DIGEST] = found

    def digest(self) -> bytes:
        """The digest, once all cells are in."""
        return digest(self.digests)


def root(metas: Mapping[str, TensorMeta], digests: Mapping[str, bytes]) -> str:
    """The hash of a set of tensors, as 64 hexadecimal digits; `digests` names them."""
    total = hashlib.sha256()
    for name in sorted(digests):
        meta = metas[name]
        total.update(f"{name}\n{DTYPE_NAMES[meta.dtype]} {list(meta.shape)}\n".encode())
        total.update(digests[name])
    return total.hexdigest()


def root_of(store: TensorStore, names: Iterable[str]) -> str:
    """The content hash of tensors that lie in files, read cell by cell."""
    digests: dict[str, bytes] = {}
    for name in names:
        place = store.locate(name)
        if place is not None:
            hashes = TensorHash(place.meta)
            with place.path.open("rb") as file:
                file.seek(place.offset)
                for cell in range(cells(place.meta)):
                    hashes.update(cell, digest(file.read(min(CELL, place.meta.bytes - cell * CELL))))
            digests[name] = hashes.digest()
    return root(store.metas, digests)


def table(metas: Mapping[str, TensorMeta]) -> str:
    """The hash of names, dtypes and shapes alone: tells most files apart by their headers, as 64 hexadecimal digits."""
    return root(metas, dict.fromkeys(metas, b""))
