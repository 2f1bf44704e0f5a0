"""Stores over stores: other names, fewer tensors, parts of tensors. Nothing is read before it is asked for.

A view passes a tensor's location on wherever its bytes are still the same, so that what streams byte ranges can stream
through views.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.store import Location, TensorMeta, TensorStore, quote


@dataclass(frozen=True)
class Renamed:
    """A store's tensors by other names."""

    store: TensorStore
    names: Mapping[str, str]
    """What a tensor is called in `store`, by its new name; tensors that are not in it are left out."""

    @cached_property
    def _metas(self) -> Mapping[str, TensorMeta]:
        metas = self.store.metas
        return {name: metas[own] for name, own in self.names.items()}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's new name, shape and dtype."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The tensor `name`, freshly allocated on the CPU."""
        return self.store.read(self.names[name])

    def locate(self, name: str) -> Location | None:
        """Where the values of `name` lie in a file; None when they are computed."""
        return self.store.locate(self.names[name])


@dataclass(frozen=True)
class Filtered:
    """Those of a store's tensors whose names fit one of `keep` and none of `drop`: patterns with `*` and `?`."""

    store: TensorStore
    keep: tuple[str, ...] = ("*",)
    drop: tuple[str, ...] = ()

    @cached_property
    def _metas(self) -> Mapping[str, TensorMeta]:
        def fits(name: str, patterns: tuple[str, ...]) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in patterns)

        metas = self.store.metas
        return {name: metas[name] for name in metas if fits(name, self.keep) and not fits(name, self.drop)}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """The name, shape and dtype of every tensor that is kept."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The tensor `name`, freshly allocated on the CPU."""
        return self.store.read(self._kept(name))

    def locate(self, name: str) -> Location | None:
        """Where the values of `name` lie in a file; None when they are computed."""
        return self.store.locate(self._kept(name))

    def _kept(self, name: str) -> str:
        if name not in self._metas:
            raise KeyError(name)
        return name


@dataclass(frozen=True)
class Piece:
    """A tensor of a store, or some of its rows, in another shape."""

    name: str
    shape: tuple[int, ...]
    """Of the piece, once it is transposed."""
    start: int = 0
    """Its first row, an index into the first dimension."""
    rows: int | None = None
    """How many rows are taken; None takes all of them."""
    transposed: bool = False
    """Whether the first two dimensions change places, before it takes its shape."""


@dataclass(frozen=True)
class Assembled:
    """Tensors made of pieces of another store's, joined along the first dimension."""

    store: TensorStore
    recipes: Mapping[str, Sequence[Piece]]

    @cached_property
    def _metas(self) -> Mapping[str, TensorMeta]:
        found: dict[str, TensorMeta] = {}
        metas = self.store.metas
        for name, pieces in self.recipes.items():
            dtypes = {metas[piece.name].dtype for piece in pieces}
            if len(dtypes) > 1:
                raise DataError(f"{quote(pieces[0].name)} and {quote(pieces[1].name)}: one tensor of several dtypes")
            rows = sum(piece.shape[0] for piece in pieces) if len(pieces) > 1 else None
            shape = pieces[0].shape if rows is None else (rows, *pieces[0].shape[1:])
            found[name] = TensorMeta(shape, dtypes.pop())
        return found

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's name, shape and dtype."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The tensor `name`, freshly allocated on the CPU."""
        parts = [self._part(piece) for piece in self.recipes[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, piece: Piece) -> Tensor:
        tensor = self.store.read(piece.name)
        if piece.rows is not None:
            tensor = tensor[piece.start : piece.start + piece.rows].clone()
        if piece.transposed:
            tensor = tensor.transpose(0, 1).contiguous()
        return tensor.reshape(piece.shape)

    def locate(self, name: str) -> Location | None:
        """Where the values of `name` lie in a file: there, for some rows of one tensor. None for all others."""
        pieces = self.recipes[name]
        if len(pieces) > 1 or pieces[0].transposed:
            return None
        (piece,) = pieces
        whole = self.store.locate(piece.name)
        if whole is None:
            return None
        row = prod(whole.meta.shape[1:]) * whole.meta.dtype.itemsize
        return Location(whole.path, whole.offset + piece.start * row, self.metas[name], whole.file_bytes)

    def places(self, name: str) -> list[Location] | None:
        """Where the values of `name` lie in files, in their order; None when they have to be computed."""
        found = [Assembled(self.store, {name: [piece]}).locate(name) for piece in self.recipes[name]]
        whole = [place for place in found if place is not None]
        return whole if len(whole) == len(found) else None


@dataclass(frozen=True)
class Extended:
    """A store with some more tensors, which are given."""

    store: TensorStore
    more: Mapping[str, Tensor]

    @cached_property
    def _metas(self) -> Mapping[str, TensorMeta]:
        more = {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in self.more.items()}
        return {**self.store.metas, **more}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's name, shape and dtype."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The tensor `name`, freshly allocated on the CPU."""
        return self.more[name].clone() if name in self.more else self.store.read(name)

    def locate(self, name: str) -> Location | None:
        """Where the values of `name` lie in a file; None when they are computed, or given."""
        return None if name in self.more else self.store.locate(name)


@dataclass(frozen=True)
class Joined:
    """The tensors of two stores, which have no name in common."""

    one: TensorStore
    other: TensorStore

    @cached_property
    def _metas(self) -> Mapping[str, TensorMeta]:
        assert not self.one.metas.keys() & self.other.metas.keys()
        return {**self.one.metas, **self.other.metas}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's name, shape and dtype."""
        return self._metas

    def holder(self, name: str) -> TensorStore:
        """The one of the two that has the tensor `name`."""
        return self.one if name in self.one.metas else self.other

    def read(self, name: str) -> Tensor:
        """The tensor `name`, freshly allocated on the CPU."""
        return self.holder(name).read(name)

    def locate(self, name: str) -> Location | None:
        """Where the values of `name` lie in a file; None when they are computed."""
        return self.holder(name).locate(name)
