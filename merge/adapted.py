"""A LoRA file as the source of a merge: its differences, under the names of the checkpoint that they are added to."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from merge.lora.delta import LoraDelta
from merge.lora.network import Network
from merge.methods.add import Add
from merge.methods.base import Space
from merge.recipe import Apply, Node, Source, ordered, sources
from tuner.errors import ConfigError, DataError
from tuner.weights.adapters.file import read_adapters
from tuner.weights.adapters.peft_config import FILE, adapters_file
from tuner.weights.checkpoint import open_files
from tuner.weights.store import TensorMeta, TensorStore
from tuner.weights.views import Piece


def lora_source(name: str, path: Path, target: TensorStore) -> Source:
    """The LoRA at `path`, a file or a folder of peft's, to be added to checkpoints with the names of `target`.

    Raises:
        DataError: the LoRA is damaged, or was made for another network; the message names tensors.
    """
    network = Network.of(target)
    try:
        delta = LoraDelta(read_adapters(path, network.modules), network.store)
    except DataError as error:
        text = str(error)
        raise DataError(text if str(path) in text else f"{path}: {text}") from error
    differences = delta if network.pieces is None else Scattered(delta, target, network.pieces)
    config = adapters_file(path.expanduser()).with_name(FILE)
    return Source(name, differences, Space.DELTA, open_files(path), (config,) if config.is_file() else ())


def refuse_moved(root: Node, made_for: Mapping[Node, Node]) -> None:
    """Refuse a DoRA or its like that is added to other weights than those that its difference was worked out for.

    Args:
        root: the graph.
        made_for: the checkpoint that the difference of each LoRA was worked out for.

    Raises:
        ConfigError: naming both.
    """
    for node in ordered(root):
        if not isinstance(node, Apply):
            continue
        for lora in (each for below in node.inputs for each in _depending(below)):
            for onto in (_without_loras(other) for other in node.inputs if other.space is Space.WEIGHT):
                if onto is not made_for[lora]:
                    raise ConfigError(
                        f"steps.{node.name}: {lora.name!r} depends on the weights that it is added to, and was worked "
                        f"out for those of {made_for[lora].name!r}; add it to that model, or do the rest first, as a "
                        "merge of its own"
                    )


def _depending(node: Node) -> list[Source]:
    """The LoRAs in a difference whose own ones depend on a checkpoint's weights."""
    if isinstance(node, Source):
        delta = node.store.delta if isinstance(node.store, Scattered) else node.store
        return [node] if isinstance(delta, LoraDelta) and not delta.adapters.linear else []
    return [lora for below in node.inputs for lora in _depending(below)] if node.space is Space.DELTA else []


def _without_loras(node: Node) -> Node:
    """What LoRAs, and nothing else, have been added to: each of their differences is from that."""
    while isinstance(node, Apply) and isinstance(node.method, Add):
        if any(source.space is Space.WEIGHT for source in sources(node.inputs[1])):
            break
        node = node.inputs[0]
    return node


@dataclass(frozen=True)
class Scattered:
    """Differences of canonical tensors as those of a single file's, in which one tensor may hold several of them."""

    delta: LoraDelta
    target: TensorStore
    pieces: Mapping[str, tuple[Piece, ...]]
    """Where each canonical tensor lies in the single file's."""

    @cached_property
    def _parts(self) -> Mapping[str, list[str]]:
        """The canonical tensors that change, by the tensor that they are in."""
        parts: dict[str, list[str]] = {}
        for name in self.delta.metas:
            parts.setdefault(self.pieces[name][0].name, []).append(name)  # all of them are of one tensor
        return parts

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """The changed tensors, float32."""
        return self._metas

    @cached_property
    def _metas(self) -> Mapping[str, TensorMeta]:
        found: dict[str, TensorMeta] = {}
        for name, parts in self._parts.items():
            shape = self.target.metas[name].shape
            alone = self.delta.metas[parts[0]].shape
            if len(shape) == len(alone) == 4:  # a first convolution may have other input channels
                shape = alone
            found[name] = TensorMeta(shape, torch.float32)
        return found

    def locate(self, name: str) -> None:
        """None: they are computed."""
        _ = self.metas[name]

    def read(self, name: str) -> Tensor:
        """What is added to the tensor `name`, freshly allocated."""
        shape = self.metas[name].shape
        return self.read_range(name, 0, prod(shape)).clone().reshape(shape)

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """The elements from `start` to `stop` of what is added to `name`, flat."""
        parts = self._parts[name]
        first, *others = self.pieces[parts[0]]
        if first.rows is None and not first.transposed and not others:
            return self.delta.read_range(parts[0], start, stop)
        whole = torch.zeros(self.metas[name].shape)
        for part in parts:
            rows, done = self.delta.read(part), 0
            for piece in self.pieces[part]:
                if piece.transposed:
                    rows = rows.reshape(*reversed(whole.shape[:2])).transpose(0, 1)
                count = whole.shape[0] if piece.rows is None else piece.rows
                whole[piece.start : piece.start + count] = rows[done : done + count].reshape(count, *whole.shape[1:])
                done += count
        return whole.reshape(-1)[start:stop]
