"""Which parts of a network may change places: numbers move, and what the network computes stays the same.

Two networks that were trained apart may have learned the same units in another order, and then their average is noise.
Of Stable Diffusion's networks these may be exchanged, each with everything that belongs to it:

    residual layers     channels between the two convolutions, within a group of the norm there, and groups as wholes
    attention           heads; within a head what queries and keys are compared by, and what values are made of
    feed-forward        units between the two linear layers (of a gated one both halves)
    transformers        what runs through all their blocks, from proj_in to proj_out
    time                units of the time's network, and its result, which every residual layer reads

The channels that go from layer to layer of a U-Net stay: skip connections put them side by side, so that the groups of
the norms behind do not line up, and hardly anything may move. So does what runs through a text encoder, for it is what
the U-Net's cross-attention reads.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.architecture import Family, identify
from tuner.weights.store import Location, TensorMeta, TensorStore

Metas = Mapping[str, TensorMeta]


@dataclass(frozen=True)
class Axis:
    """A dimension of a tensor that runs over units."""

    tensor: str
    dim: int
    copies: int = 1
    """How often they all come, one time after the other."""
    before: int = 0
    """How many parts of that length lie in front, of other units: where one tensor is queries, keys and values."""
    after: int = 0
    """How many lie behind."""

    @property
    def parts(self) -> int:
        """How many parts of the units' number the dimension has."""
        return self.before + self.copies + self.after


@dataclass(frozen=True)
class Symmetry:
    """Units that may be exchanged: blocks of them as wholes, and those of a block among themselves.

    Units of several roles may share their blocks, as queries and values do their heads: in a block each role has an
    order of its own.
    """

    name: str
    units: int
    """How many, of each role."""
    roles: tuple[tuple[Axis, ...], ...]
    """Where each role's units are."""
    blocks: int = 1


@dataclass(frozen=True)
class Structure:
    """What the shapes of tensors do not tell."""

    groups: int = 32
    """Of the norms in residual layers."""
    heads: int | None = 8
    """Of an attention layer in the U-Net; None where their number follows from their width."""
    width: int = 64
    """Of a head where it is the number that follows: in text encoders, and in the U-Nets of most families."""

    @staticmethod
    def of(metas: Metas) -> "Structure":
        """That of a checkpoint's family.

        Raises:
            DataError: it is none of those whose symmetries are known.
        """
        family = identify(metas).family
        if family is None or family not in HEADS:
            raise DataError(f"no checkpoint of {', '.join(HEADS)}, whose symmetries are known; merge without aligning")
        return Structure(heads=HEADS[family])


HEADS: dict[Family, int | None] = {"sd1": 8, "sd2": None, "sdxl": None, "sdxl-refiner": None}

# Names are those of diffusers' folders, and after "or" those of original single files, where they differ.
RESIDUAL = (
    ("conv1", "time_emb_proj", "norm2", "conv2"),
    ("in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"),
)
ATTENTION = (
    ("to_q", "to_k", "to_v", "to_out.0"),  # of the U-Net; in newer folders also of the autoencoder
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),  # of text encoders
    ("query", "key", "value", "proj_attn"),  # of the autoencoder, in older folders
    ("attn_1.q", "attn_1.k", "attn_1.v", "attn_1.proj_out"),  # of the autoencoder, in single files
)
FUSED = "attn.in_proj_", "attn.out_proj"
"""Queries, keys and values in one, and what reads them: of text encoders with OpenCLIP's names."""
FEED_FORWARD = (("ff.net.0.proj", "ff.net.2", 2), ("mlp.fc1", "mlp.fc2", 1), ("mlp.c_fc", "mlp.c_proj", 1))
TIME = (
    ("time_embedding.linear_1", "time_embedding.linear_2"),
    ("time_embed.0", "time_embed.2"),
)
ADDED = (("add_embedding.linear_1", "add_embedding.linear_2"), ("label_emb.0.0", "label_emb.0.2"))


def symmetries(metas: Metas, structure: Structure) -> tuple[Symmetry, ...]:
    """All that are known of a checkpoint's tensors, those that tell most of the others' places first.

    Args:
        metas: of a whole checkpoint, or of one component, with the names of either layout.
    """
    found = _Finder(metas, structure)
    return (*found.time(), *found.streams(), *found.residual(), *found.attention(), *found.feed_forward())


class _Finder:
    def __init__(self, metas: Metas, structure: Structure) -> None:
        self.metas = metas
        self.structure = structure

    def prefixes(self, module: str) -> Iterator[str]:
        """How the names begin of all modules called `module`, up to there."""
        ending = f"{module}.weight"
        for name in self.metas:
            if name == ending or name.endswith(f".{ending}"):
                yield name.removesuffix(ending)

    def rows(self, module: str, copies: int = 1) -> list[Axis]:
        """What `module` gives: the first dimension of its weight and bias, as far as it has them."""
        names = (f"{module}.weight", f"{module}.bias")
        return [Axis(name, 0, copies) for name in names if name in self.metas]

    def columns(self, module: str) -> list[Axis]:
        """What `module` takes."""
        name = f"{module}.weight"
        return [Axis(name, 1)] if name in self.metas else []

    def made(self, name: str, *roles: list[Axis], blocks: int = 1) -> Iterator[Symmetry]:
        """The symmetry of these axes, which have one length, of whole blocks.

        Raises:
            DataError: the lengths do not fit.
        """
        lengths = {self.metas[axis.tensor].shape[axis.dim] / axis.parts for role in roles for axis in role}
        units = int(max(lengths))
        if lengths != {units} or not blocks or units % blocks:
            found = " and ".join(f"{length:g}" for length in sorted(lengths))
            raise DataError(f"{name.strip('.')}: {found} units in {blocks} blocks do not fit; is it another structure?")
        yield Symmetry(name.strip("."), units, tuple(tuple(role) for role in roles), blocks)

    def residual(self) -> Iterator[Symmetry]:
        for first, time, norm, second in RESIDUAL:
            for prefix in self.prefixes(first):
                if f"{prefix}{norm}.weight" in self.metas and f"{prefix}{second}.weight" in self.metas:
                    axes = [*self.rows(prefix + first), *self.rows(prefix + time), *self.rows(prefix + norm)]
                    axes += self.columns(prefix + second)
                    yield from self.made(prefix, axes, blocks=self.structure.groups)

    def attention(self) -> Iterator[Symmetry]:
        for query, key, value, out in ATTENTION:
            for prefix in self.prefixes(query):
                if f"{prefix}{out}.weight" in self.metas:
                    compared = [*self.rows(prefix + query), *self.rows(prefix + key)]
                    carried = [*self.rows(prefix + value), *self.columns(prefix + out)]
                    width = self.metas[f"{prefix}{query}.weight"].shape[0]
                    heads = self.heads(prefix, query, width)
                    yield from self.made(f"{prefix}{query}".rpartition(".")[0], compared, carried, blocks=heads)
        fused, out = FUSED
        for prefix in self.prefixes(out):
            names = [name for kind in ("weight", "bias") if (name := f"{prefix}{fused}{kind}") in self.metas]
            if names:
                compared = [Axis(name, 0, copies=2, after=1) for name in names]
                carried = [*(Axis(name, 0, before=2) for name in names), *self.columns(prefix + out)]
                heads = self.metas[f"{prefix}{out}.weight"].shape[1] // self.structure.width
                yield from self.made(f"{prefix}{out}".rpartition(".")[0], compared, carried, blocks=heads)

    def heads(self, prefix: str, query: str, width: int) -> int:
        if "transformer_blocks." in prefix and self.structure.heads is not None:
            return self.structure.heads
        if "transformer_blocks." in prefix or query == "self_attn.q_proj":
            return width // self.structure.width
        return 1  # in autoencoders

    def feed_forward(self) -> Iterator[Symmetry]:
        for first, second, copies in FEED_FORWARD:
            for prefix in self.prefixes(first):
                if f"{prefix}{second}.weight" in self.metas:
                    axes = [*self.rows(prefix + first, copies), *self.columns(prefix + second)]
                    yield from self.made(f"{prefix}{first}".partition(".net.")[0], axes)

    def streams(self) -> Iterator[Symmetry]:
        for prefix in self.prefixes("proj_in"):
            inside = f"{prefix}transformer_blocks."
            modules = {name.rpartition(".")[0] for name in self.metas if name.startswith(inside)}
            if not modules or f"{prefix}proj_out.weight" not in self.metas:
                continue
            axes = self.rows(f"{prefix}proj_in")
            for module in sorted(modules):
                inner = module.removeprefix(inside).partition(".")[2]
                if re.fullmatch(r"norm\d|attn\d\.to_out\.0|ff\.net\.2", inner):
                    axes += self.rows(module)
                elif inner in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "ff.net.0.proj"):
                    axes += self.columns(module)
            yield from self.made(prefix, [*axes, *self.columns(f"{prefix}proj_out")])

    def time(self) -> Iterator[Symmetry]:
        readers = [time for _, time, _, _ in RESIDUAL]
        for (first, second), added in zip(TIME, ADDED, strict=True):
            for prefix in self.prefixes(first):
                pairs = [pair for pair in ((first, second), added) if f"{prefix}{pair[0]}.weight" in self.metas]
                for one, two in pairs:
                    yield from self.made(prefix + one, [*self.rows(prefix + one), *self.columns(prefix + two)])
                result = [axis for _, two in pairs for axis in self.rows(prefix + two)]
                for reader in readers:
                    inside = [name for name in self.prefixes(reader) if name.startswith(prefix)]
                    result += [axis for name in inside for axis in self.columns(name + reader)]
                yield from self.made(prefix + second, result)


Orders = tuple[Tensor, ...]
"""Of a symmetry, for each of its roles: which unit of the old order stands at each place, `[units]`."""


@dataclass(frozen=True)
class Permuted:
    """A store whose units are in another order; the network that it holds computes the same."""

    store: TensorStore
    symmetries: tuple[Symmetry, ...]
    orders: Mapping[str, Orders]
    """By the symmetry's name; units of others stay where they are."""

    @cached_property
    def _turns(self) -> Mapping[str, list[tuple[Axis, Tensor]]]:
        turns: dict[str, list[tuple[Axis, Tensor]]] = defaultdict(list)
        for symmetry in self.symmetries:
            if symmetry.name in self.orders:
                for axes, order in zip(symmetry.roles, self.orders[symmetry.name], strict=True):
                    for axis in axes:
                        turns[axis.tensor].append((axis, order))
        return turns

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's name, shape and dtype."""
        return self.store.metas

    def read(self, name: str) -> Tensor:
        """The tensor `name`, freshly allocated on the CPU."""
        tensor = self.store.read(name)
        for axis, order in self._turns.get(name, ()):
            parts = torch.arange(len(order)).repeat(axis.parts, 1)
            parts[axis.before : axis.before + axis.copies] = order
            parts += len(order) * torch.arange(axis.parts)[:, None]
            tensor = tensor.index_select(axis.dim, parts.reshape(-1))
        return tensor

    def locate(self, name: str) -> Location | None:
        """Where the values of `name` lie in a file; None when units of it are in another order there."""
        return None if name in self._turns else self.store.locate(name)


def units_of(tensor: Tensor, axis: Axis) -> Tensor:
    """`[copies, units, numbers]`: what of `tensor` belongs to each unit."""
    size = tensor.shape[axis.dim] // axis.parts
    own = tensor.narrow(axis.dim, axis.before * size, axis.copies * size)
    return own.movedim(axis.dim, 0).reshape(axis.copies, size, -1)
