"""What a pickle says, without doing any of it.

A pickle is a program for a small stack machine. This reads one that torch wrote, instruction by instruction, and keeps
notes of what it would build: `Table` for dictionaries, `TensorNote` for tensors, `Thing` for whatever else. No name in
it is looked up, nothing is imported or called, and no more memory is taken than a fixed number of instructions can ask
for.
"""

import pickletools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from tuner.errors import DataError, UnsafeError
from tuner.weights.store import DTYPES, quote

MAX_BYTES = 16_000_000
MAX_INSTRUCTIONS = 600_000
"""A checkpoint takes some thirty for each tensor."""

STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch.storage UntypedStorage": torch.uint8,
}
"""By the name that a pickle has for it: what is in a storage. An untyped one is counted in bytes."""
NAMED_DTYPES = {f"torch {str(dtype).removeprefix('torch.')}": dtype for dtype in DTYPES.values()}

ORDERED = {"collections OrderedDict", "collections defaultdict"}
PARAMETER = {"torch._utils _rebuild_parameter", "torch.nn.parameter Parameter"}
TENSOR = {"torch._utils _rebuild_tensor": 4, "torch._utils _rebuild_tensor_v2": 4, "torch._utils _rebuild_tensor_v3": 7}
"""What makes a tensor: of how many arguments the last one matters. The third takes the dtype as its seventh."""
HARMLESS = {
    *("_codecs", "argparse", "collections", "datetime", "lightning", "lightning_fabric", "lightning_utilities"),
    *("numpy", "omegaconf", "pathlib", "pytorch_lightning", "torch", "typing"),
}
"""Packages whose objects trainers leave in checkpoints. They are skipped; a name of another package is a reason to
refuse the file, as no checkpoint has a use for it."""


@dataclass(frozen=True, slots=True)
class Name:
    """A function or class, by module and name."""

    text: str


@dataclass(frozen=True, slots=True)
class Thing:
    """Something that is not built: what `name` would have made."""

    name: str


@dataclass(slots=True)
class Table:
    """A dictionary; of entries without a text for a key only the number is kept."""

    entries: dict[str, object] = field(default_factory=dict[str, object])
    others: int = 0

    def put(self, key: object, value: object) -> None:
        """Set one entry."""
        if isinstance(key, str):
            self.entries[key] = value
        else:
            self.others += 1


@dataclass(frozen=True, slots=True)
class StorageNote:
    """A run of numbers in a file of its own."""

    key: str
    dtype: torch.dtype
    elements: int


@dataclass(frozen=True, slots=True)
class TensorNote:
    """A tensor: element (i, j, …) is number `offset + i · stride[0] + j · stride[1] + …` of the storage."""

    storage: StorageNote
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    """Of the tensor; `offset` and `stride` count in it."""


_MARK = object()
_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING"),
}


def read_pickle(data: bytes, place: str) -> object:
    """What the pickle `data` describes: numbers, texts, tuples and lists, `Table`, `TensorNote`, `Thing`.

    Args:
        data: the pickle.
        place: where it is, for the messages.

    Raises:
        DataError: it is damaged, too long, or not of the kind that torch writes.
        UnsafeError: it names something that no checkpoint has a use for.
    """
    machine = _Machine(place)
    count = 0
    try:
        if len(data) > MAX_BYTES:
            raise DataError(f"{place}: {len(data)} bytes of structure, expected at most {MAX_BYTES}; do not use it")
        for instruction, argument, _ in pickletools.genops(data):
            count += 1
            if count > MAX_INSTRUCTIONS:
                raise DataError(f"{place}: more than {MAX_INSTRUCTIONS} instructions; do not use it")
            if instruction.name == "STOP":
                return machine.pop()
            machine.step(instruction.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: is damaged at instruction {count} ({error}); download it again") from error
    raise DataError(f"{place}: ends too early; download it again")


class _Machine:
    """The stack, and the memory of what was built before."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.stack: list[object] = []
        self.memory: dict[int, object] = {}

    def pop(self) -> object:
        return self.stack.pop()

    def pop_to_mark(self) -> list[object]:
        items: list[object] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def step(self, name: str, argument: object) -> None:
        """Carry out one instruction.

        Raises:
            ValueError, IndexError, KeyError, TypeError: the pickle is damaged.
        """
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _IGNORED:
            pass
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memory[cast(int, argument)])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memory[cast(int, argument)] = stack[-1]
        elif name == "MEMOIZE":
            self.memory[len(self.memory)] = stack[-1]
        elif name == "MARK":
            stack.append(_MARK)
        else:
            self._build(name, argument)

    def _build(self, name: str, argument: object) -> None:
        stack = self.stack
        match name:
            case "EMPTY_DICT":
                stack.append(Table())
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(stack) < count:
                    raise IndexError("stack is empty")
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE" | "LIST" | "FROZENSET":
                items = self.pop_to_mark()
                stack.append(tuple(items) if name == "TUPLE" else items)
            case "APPEND":
                self._extend([self.pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self.pop_to_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self._put([key, value])
            case "SETITEMS":
                self._put(self.pop_to_mark())
            case "DICT":
                items = self.pop_to_mark()
                stack.append(Table())
                self._put(items)
            case "GLOBAL":
                stack.append(self._name(str(argument)))
            case "STACK_GLOBAL":
                member, module = self.pop(), self.pop()
                stack.append(self._name(f"{module} {member}"))
            case "BINPERSID":
                stack.append(_storage(self.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, maker = self.pop(), self.pop()
                stack.append(_make(maker, arguments))
            case "NEWOBJ_EX":
                _, arguments, maker = self.pop(), self.pop(), self.pop()
                stack.append(_make(maker, arguments))
            case "BUILD":
                self.pop()  # attributes of what lies below, such as the versions of a state dict's layers
                _ = stack[-1]
            case _:
                raise ValueError(f"instruction {name} is not one of torch's")

    def _extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            cast(list[object], target).extend(items)
        elif not isinstance(target, Thing):
            raise TypeError("items of what is no list")

    def _put(self, items: Sequence[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, Table):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target.put(key, value)
        elif not isinstance(target, Thing):
            raise TypeError("entries of what is no dictionary")

    def _name(self, text: str) -> Name:
        module, _, _ = text.partition(" ")
        if module.partition(".")[0] not in HARMLESS and text not in ("__builtin__ set", "builtins set"):
            raise UnsafeError(
                f"{self.place}: would call {quote(text.replace(' ', '.'))} when opened; nothing was run, do not use it"
            )
        return Name(text)


def _make(maker: object, arguments: object) -> object:
    """What calling `maker` would have given."""
    if not isinstance(maker, Name) or not isinstance(arguments, tuple):
        return Thing(maker.name if isinstance(maker, Thing) else "?")
    given = cast(tuple[object, ...], arguments)
    if maker.text in ORDERED:
        table = Table()
        for items in given:
            for pair in cast(list[object], items) if isinstance(items, list) else []:
                key, value = cast(Sequence[object], pair)
                table.put(key, value)
        return table
    if maker.text in PARAMETER:
        return given[0]
    if maker.text in TENSOR:
        return _tensor(given[: TENSOR[maker.text]])
    return Thing(maker.text.replace(" ", "."))


def _tensor(given: tuple[object, ...]) -> TensorNote:
    storage, offset, shape, stride, *more = given
    sizes, steps = _whole_numbers(shape), _whole_numbers(stride)
    if not isinstance(storage, StorageNote) or type(offset) is not int or offset < 0 or len(sizes) != len(steps):
        raise ValueError("a tensor whose parts do not fit")
    if not more:
        return TensorNote(storage, offset, sizes, steps, storage.dtype)
    named = more[-1]
    if not isinstance(named, Name) or named.text not in NAMED_DTYPES:
        raise ValueError("a tensor of an unknown dtype")
    return TensorNote(storage, offset, sizes, steps, NAMED_DTYPES[named.text])


def _storage(note: object) -> StorageNote:
    """From what torch writes for one: `("storage", class, key, device, elements)`."""
    items = cast(tuple[object, ...], note) if isinstance(note, tuple) else ()
    if len(items) < 5 or items[0] != "storage" or not isinstance(items[1], Name):
        raise ValueError("no storage of torch's")
    key, elements = items[2], items[4]
    if items[1].text not in STORAGES or not isinstance(key, str) or type(elements) is not int or elements < 0:
        raise ValueError(f"an unknown storage {items[1].text}")
    return StorageNote(key, STORAGES[items[1].text], elements)


def _whole_numbers(value: object) -> tuple[int, ...]:
    numbers = cast(tuple[object, ...], value) if isinstance(value, tuple) else (None,)
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise ValueError("sizes that are no whole numbers")
    return cast(tuple[int, ...], numbers)
