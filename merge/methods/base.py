"""A merge method: the arithmetic that makes one tensor out of a few of the same name and shape.

A method is a frozen dataclass; its fields are its settings. It says what it takes and gives (`Space`), and does one of
three things. `Elementwise` methods combine numbers that stand at the same place and need no others. `Fitted` methods
look at the whole of the inputs first, in passes over chunks, and combine elementwise after that. `Whole` methods need
the tensors in their shape and in memory.

Arithmetic has the dtype of the tensors that it is given: float32 when the output has 16 bits or fewer, else float64.
So the one rounding, to the output's dtype, is the only one that matters. Sums over a tensor are float64 always.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Annotated, ClassVar, Protocol

from torch import Tensor

from tuner.plugins import Folder


class Space(Enum):
    """What a tensor means. Adding two checkpoints is a mistake; adding a difference is not."""

    WEIGHT = "weight"
    """A checkpoint's values."""
    DELTA = "delta"
    """A difference of two checkpoints, or a LoRA's product."""
    EITHER = "either"
    """Of one application, all of them weights or all of them deltas."""


@dataclass(frozen=True)
class Extent:
    """What a method is applied to, as far as its memory goes."""

    shape: tuple[int, ...]
    """Of the tensor."""
    inputs: int
    size: int
    """Bytes of one number in the arithmetic: 4 or 8."""
    grid: int
    """Numbers in a run at most."""

    @property
    def elements(self) -> int:
        """How many numbers each input has."""
        return prod(self.shape)

    @property
    def run(self) -> int:
        """How many numbers the longest run has."""
        return min(self.elements, self.grid)


@dataclass(frozen=True)
class Memory:
    """Bytes that a method takes at once, at most, beside a run of each input and of the result."""

    lent: int = 0
    """By `merge.scratch`, for runs: they stay with each thread."""
    asked: int = 0
    """Of the C library, for runs: they are given back."""
    whole: int = 0
    """Besides, where that depends on the tensor's size, as long as it looks at the tensor. Threads that would take more
    together than the largest tensor does alone wait for each other."""
    held: int = 0
    """What of `whole` stays until the tensor is written."""


class MergeMethod(ABC):
    """What every method says of itself."""

    takes: ClassVar[tuple[Space, ...]]
    """The space of each input."""
    repeats: ClassVar[bool] = False
    """Whether the last of `takes` may recur any number of times."""
    gives: ClassVar[Space]
    """The space of the result; `EITHER`: that of the inputs which are `EITHER`."""
    per_input: ClassVar[tuple[str, ...]] = ("weights",)
    """Settings that hold one value for each input, or none at all, where the method has them."""
    temporaries: ClassVar[float] = 4
    """Numbers that it needs besides, for each number of a run; `memory` says what does not come to that. The default is
    a guess for methods that say nothing, and more than most take."""

    def unchanged(self) -> int | None:
        """Which input the result is, bit for bit, by the numbers alone: such a tensor is copied. None: it is merged."""
        return None

    def memory(self, of: Extent) -> Memory:
        """What the method takes, for the plan's forecast."""
        return Memory(int(self.temporaries * of.size * of.run))


Merge = Callable[[Sequence[Tensor], Tensor, int], None]
"""`merge(inputs, out, start)`: writes into `out` the result for the elements from `start` on of the flattened tensor.

All are flat, of one length and dtype. Inputs are never changed; `out` is none of them.
"""


class Elementwise(MergeMethod):
    """A method whose result at one place depends on the inputs at that place alone."""

    def spreads(self) -> bool:
        """Whether no result is finite where an input is not: then inputs need no look of their own."""
        return False

    @abstractmethod
    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        """Write the result into `out`. Inputs are of its shape and dtype, and must not be changed."""


class Tensors(Protocol):
    """The inputs of one application for one tensor name, which may be too large to hold."""

    @property
    def name(self) -> str:
        """The tensor's name."""
        ...

    @property
    def inputs(self) -> int:
        """How many there are."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each."""
        ...

    @property
    def elements(self) -> int:
        """How many numbers each input has."""
        ...

    def chunks(self, start: int = 0) -> Iterator[tuple[int, list[Tensor]]]:
        """All inputs, run by run: the index of the run's first element, and a flat tensor of each input.

        The runs are the same on every machine and for every setting (`GRID` elements; fewer in the last), so that sums
        over them are too; `start` is where one of them begins. The tensors are overwritten by the next run, and must
        not be changed.
        """
        ...

    def look(self, places: Sequence[int], length: int) -> list[Tensor] | None:
        """All inputs at some places: `length` numbers from each on, one after the other in a flat tensor of each input.

        They are at most `GRID` numbers, and overwritten as those of `chunks`. None where that would be no less work
        than going through all of them.
        """
        ...

    def whole(self, index: int) -> Tensor:
        """Input `index` in its shape, freshly allocated."""
        ...


GRID = 1 << 18
"""Elements in one run of `Tensors.chunks`: small enough for a core's cache."""


class Fitted(MergeMethod):
    """A method that must see all of a tensor before it can say anything about one place."""

    @abstractmethod
    def fit(self, tensors: Tensors) -> Merge:
        """Look at `tensors`, in as many passes as it takes, and return what merges a run of them."""


class Whole(Fitted):
    """A method that needs its tensors in their shape, at once."""

    @abstractmethod
    def compute(self, tensors: Sequence[Tensor]) -> Tensor:
        """The result, of the inputs' shape and dtype. Inputs must not be changed."""

    def computing(self, of: Extent) -> float:
        """Bytes that `compute` takes at once, with the result, beside the inputs; `temporaries` for each number."""
        return self.temporaries * of.size * of.elements

    def memory(self, of: Extent) -> Memory:
        """All inputs and what is computed from them; then the result."""
        tensor = of.size * of.elements
        return Memory(whole=int(of.inputs * tensor + self.computing(of)), held=tensor)

    def fit(self, tensors: Tensors) -> Merge:
        """Compute everything, to be handed out run by run."""
        inputs = [tensors.whole(index) for index in range(tensors.inputs)]
        result = self.compute(inputs).reshape(-1)

        def merge(inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
            out.copy_(result[start : start + out.numel()])

        return merge


AnyMergeMethod = Annotated[MergeMethod, Folder("merge.methods")]
