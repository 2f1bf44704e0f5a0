"""Adapters as a difference from a checkpoint, of which any numbers can be asked for without forming the rest.

    source = Source("lora", LoraDelta(read_adapters(path, modules), base), Space.DELTA)
    root = base + 0.8 * source

What is only added to a weight, as LoRA, LoHa and LoKr do, is computed a block of rows at a time. What depends on the
weight, as DoRA, OFT and (IA)³ do, is W' - W for the weights of `target`; so 0.8 of it is W + 0.8 (W' - W).
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from merge.plan import FIRST_CHANNELS
from tuner.errors import DataError
from tuner.weights.adapters.base import Change, Difference, Transform
from tuner.weights.adapters.file import SHOWN, Adapters
from tuner.weights.store import TensorMeta, TensorStore

ANOTHER = "it is for another model, choose one for this"
KEPT = 2
"""Whole tensors that are remembered, for those changes that cannot be computed in parts."""


@dataclass(frozen=True)
class LoraDelta:
    """A store of the differences, float32, by the names of the tensors that are changed.

    The numbers of a tensor have the same bits however it is cut, and for any number of threads that read at a time.

    Raises:
        DataError: adapters for tensors that `target` has not got, or has in another shape; the message names them.
    """

    adapters: Adapters
    target: TensorStore
    """The checkpoint that is changed, whose tensors have canonical names; only what depends on it reads its values."""
    _local: threading.local = field(default_factory=threading.local, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)
    _moved: OrderedDict[str, Tensor] = field(
        default_factory=OrderedDict[str, Tensor], init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        _ = self.metas

    @cached_property
    def _changes(self) -> Mapping[str, Change]:
        """The changes to tensors that are there."""
        there = self.target.metas
        changes = {
            name: change
            for name, change in self.adapters.changes.items()
            if name in there or not (isinstance(change, Transform) and change.optional)
        }
        if lost := [name for name in changes if name not in there]:
            raise DataError(f"{len(lost)} tensors of the LoRA are not in the checkpoint: {_some(lost)}; {ANOTHER}")
        return changes

    @cached_property
    def _metas(self) -> Mapping[str, TensorMeta]:
        found: dict[str, TensorMeta] = {}
        wrong: list[str] = []
        for name, change in self._changes.items():
            shape = self.target.metas[name].shape
            if change.fits(shape):
                found[name] = TensorMeta(shape, torch.float32)
            elif isinstance(change, Difference) and _other_channels(change, shape):
                found[name] = TensorMeta(change.shape, torch.float32)
            else:
                wrong.append(f"{name} ({list(change.shape)} for {list(shape)})")
        if wrong:
            raise DataError(f"{len(wrong)} tensors of the LoRA do not fit the checkpoint's: {_some(wrong)}; {ANOTHER}")
        return found

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """The changed tensors."""
        return self._metas

    def locate(self, name: str) -> None:
        """None: they are computed."""
        _ = self.metas[name]

    def read(self, name: str) -> Tensor:
        """What is added to the tensor `name`, freshly allocated."""
        shape = self.metas[name].shape
        return self.read_range(name, 0, prod(shape)).clone().reshape(shape)

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """The elements from `start` to `stop` of what is added to `name`, flat; not to be changed."""
        change = self._changes[name]
        if stop <= start:
            return torch.empty(0)
        if isinstance(change, Transform):
            return self._difference(name, change)[start:stop]
        assert isinstance(change, Difference)
        numbers = change.block * change.columns
        blocks = [self._block(name, change, index) for index in range(start // numbers, -(-stop // numbers))]
        values = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        first = start // numbers * numbers
        return values[start - first : stop - first]

    def _block(self, name: str, change: Difference, index: int) -> Tensor:
        """One block of rows, flat. Each thread remembers its last: the next numbers asked for often begin in it."""
        last: tuple[str, int, Tensor] | None = getattr(self._local, "last", None)
        if last is not None and last[:2] == (name, index):
            return last[2]
        start = index * change.block
        values = change.rows(start, min(start + change.block, change.shape[0])).reshape(-1)
        self._local.last = (name, index, values)
        return values

    def _difference(self, name: str, change: Transform) -> Tensor:
        """W' - W, flat; computed in float64."""
        with self._lock:
            if name not in self._moved:
                weight = self.target.read(name).double()
                self._moved[name] = (change.effect(weight) - weight).float().reshape(-1)
                while len(self._moved) > KEPT:
                    self._moved.popitem(last=False)
            return self._moved[name]


def bake(weights: Mapping[str, Tensor], adapters: Adapters, strength: float = 1.0) -> dict[str, Tensor]:
    """The weights with adapters applied, in their dtypes: W + strength · (W' - W), computed in float64.

    Args:
        weights: tensors by the names that the adapters have; they stay as they are.
        adapters: what is applied.
        strength: any number; 0 changes nothing.

    Raises:
        DataError: an adapter for a tensor that is not there, or of another shape.
    """
    baked = dict(weights)
    for name, change in adapters.changes.items():
        if name not in weights:
            if isinstance(change, Transform) and change.optional:
                continue
            raise DataError(f"{name}: not among the weights; the LoRA was made for another model")
        weight = weights[name].double()
        if not change.fits(weight.shape):
            raise DataError(f"{name}: a change for {list(change.shape)}, and the weight is {list(weight.shape)}")
        if isinstance(change, Difference):
            moved = change.dense().reshape(weight.shape)
        else:
            assert isinstance(change, Transform)
            moved = change.effect(weight) - weight
        baked[name] = (weight + strength * moved).to(weights[name].dtype)
    return baked


def _other_channels(change: Difference, shape: tuple[int, ...]) -> bool:
    """Whether a first convolution differs in its input channels only, which is the plan's to decide."""
    own = change.shape
    alike = len(own) == len(shape) == 4 and (own[0], *own[2:]) == (shape[0], *shape[2:])
    return alike and not change.flattened and {own[1], shape[1]} <= FIRST_CHANNELS


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
