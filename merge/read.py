"""Sources opened for reading runs of numbers.

Most tensors lie as bytes in files and are read from their place. Others are computed, such as a LoRA's product; they
give the numbers that are asked for.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from merge.recipe import Source
from tuner.errors import DataError, ResourceError
from tuner.weights.store import Location, TensorMeta
from tuner.weights.writer import finite

SEARCHED = 1 << 20
"""Numbers that are looked at together."""


@runtime_checkable
class Ranged(Protocol):
    """A store that computes its tensors, some numbers at a time."""

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """The elements from `start` to `stop` of the flattened tensor; the same bits however a tensor is cut."""
        ...


@dataclass(frozen=True)
class Identity:
    """What tells that a file has not changed while it was read."""

    size: int
    modified: int
    inode: int

    @staticmethod
    def of(descriptor: int) -> "Identity":
        """That of an open file."""
        status = os.fstat(descriptor)
        return Identity(status.st_size, status.st_mtime_ns, status.st_ino)


class Files:
    """The files of all sources, open; shared by threads."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._open: dict[Path, int] = {}
        self.identities: dict[Path, Identity] = {}
        self._places: list[dict[str, Location | None]] = []
        self._cache: tuple[int, str, Tensor] | None = None
        self._lock = threading.Lock()
        self._sources = sources
        try:
            for source in sources:
                places = {name: source.store.locate(name) for name in source.store.metas}
                origin = source.origin
                known = [*places.values(), *([origin.locate(name) for name in origin.metas] if origin else [])]
                sizes = {place.path: place.file_bytes for place in known if place is not None}
                for path in sorted(sizes):
                    self._add(path)
                    if self.identities[path].size != sizes[path]:
                        raise DataError(f"{path}: changed its size since it was looked at; wait until it is complete")
                for path in source.beside:
                    self._add(path)
                self._places.append(places)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path) -> None:
        if path in self._open:
            return
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be opened: {error.strerror}; check its permissions") from error
        self._open[path] = descriptor
        self.identities[path] = Identity.of(descriptor)

    def close(self) -> None:
        """Close them."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def place(self, source: int, name: str) -> Location | None:
        """Where a tensor lies; None when it is computed."""
        return self._places[source][name]

    def read_bytes(self, place: Location, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a tensor from `start` on.

        Raises:
            DataError: the file has become shorter.
        """
        descriptor, offset, done = self._open[place.path], place.offset + start, 0
        while done < len(buffer):
            got = os.preadv(descriptor, [buffer[done:]], offset + done)
            if got == 0:
                raise DataError(f"{place.path}: became shorter while it was read; wait until it is complete")
            done += got

    def computed(self, source: int, name: str, start: int, stop: int) -> Tensor:
        """Numbers of a tensor that is computed."""
        store = self._sources[source].store
        if isinstance(store, Ranged):
            return store.read_range(name, start, stop)
        with self._lock:
            if self._cache is None or self._cache[:2] != (source, name):
                self._cache = (source, name, store.read(name).reshape(-1))
            return self._cache[2][start:stop]

    def not_finite(self, source: int) -> list[str]:
        """The names of a source's tensors that hold NaN or infinity; reads all of them."""
        metas = self._sources[source].store.metas
        return [name for name, meta in metas.items() if not self._finite(source, name, meta)]

    def _finite(self, source: int, name: str, meta: TensorMeta) -> bool:
        place, total = self.place(source, name), prod(meta.shape)
        for start in range(0, total, SEARCHED) if meta.dtype.is_floating_point else ():
            stop = min(start + SEARCHED, total)
            if place is None:
                values = self.computed(source, name, start, stop)
            else:
                size = place.meta.dtype.itemsize
                raw = torch.empty((stop - start) * size, dtype=torch.uint8)
                buffer = memoryview(raw.numpy())  # pyright: ignore[reportArgumentType] (arrays are buffers)
                self.read_bytes(place, start * size, buffer)
                values = raw.view(place.meta.dtype)
            if not finite(values):
                return False
        return True

    def check_unchanged(self) -> None:
        """Raise when a file is no longer what it was when it was opened.

        Raises:
            DataError: naming the file.
        """
        for path, descriptor in self._open.items():
            try:
                same = Identity.of(descriptor) == self.identities[path]
                same = same and os.path.samestat(path.stat(), os.fstat(descriptor))
            except FileNotFoundError:
                same = False
            if not same:
                raise DataError(f"{path}: changed while it was read; nothing was written, repeat the merge")
