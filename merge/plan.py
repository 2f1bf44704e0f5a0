"""What a merge will do, worked out from headers alone: no tensor is read.

For every tensor of the output the graph is boiled down to a `Program`: which sources are read, which methods are
applied with which numbers. Most of the work of understanding a merge is done here, and all of the refusing.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from merge.methods.base import Elementwise, MergeMethod, Space
from merge.recipe import Apply, Node, Select, Source, sources
from merge.scaling import DTYPE, MARK, SCALE, WEIGHT, Scaled, Scaling
from tuner.errors import ConfigError, DataError
from tuner.weights.store import DTYPE_NAMES, TensorMeta

FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
FIRST_CHANNELS = {4, 5, 8, 9}
"""Input channels of the first convolution of plain, depth, editing and inpainting models."""
LATENT_CHANNELS = 4
"""Those that all of them have first; what an inpainting model has after them is not what an editing model has."""
SHOWN = 5
"""Tensors that a message names."""
POSITIONS = "position_ids"
"""How the name of a text encoder's counter from 0 ends: the same in every model that has it, and no weights."""
ALIGNMENT = 4096
"""The values start at a multiple of this, so that they can be written directly."""


@dataclass(frozen=True)
class Leaf:
    """A tensor of a source; `source` None stands for a difference of zero."""

    source: int | None


@dataclass(frozen=True)
class Step:
    """A method with the numbers of one tensor, applied to slots: first those of the leaves, then the steps' before."""

    method: MergeMethod
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """How one tensor is made; the last slot is the result."""

    leaves: tuple[Leaf, ...]
    steps: tuple[Step, ...]

    @cached_property
    def elementwise(self) -> bool:
        """Whether every number depends on its own place only, so that tensors can be worked on together."""
        return all(isinstance(step.method, Elementwise) for step in self.steps)

    @cached_property
    def spreads(self) -> bool:
        """Whether NaN or infinity in any leaf is never a finite result."""
        methods = [step.method for step in self.steps]
        return all(isinstance(method, Elementwise) and method.spreads() for method in methods)

    def needed(self, slots: Sequence[int]) -> list[int]:
        """`slots` and those that they are made of, in the order of work."""
        found: set[int] = set()
        open_ = list(slots)
        while open_:
            slot = open_.pop()
            if slot not in found:
                found.add(slot)
                if slot >= len(self.leaves):
                    open_ += self.steps[slot - len(self.leaves)].inputs
        return sorted(found)

    def then(self, method: MergeMethod) -> "Program":
        """With `method` applied to the result."""
        last = len(self.leaves) + len(self.steps) - 1
        return Program(self.leaves, (*self.steps, Step(method, (last,))))


MADE_UP = Program((), ())
"""Of what no source has: scales, and zeros."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the output."""

    name: str
    meta: TensorMeta
    program: Program
    offset: int
    """Where its values start, from the start of the values."""
    channels: int | None = None
    """Where inputs differ in their input channels: how many of them are merged; the first source's others are kept."""
    called: str | None = None
    """Its name in the file, where that is another one."""
    scale_of: str | None = None
    """The name of the tensor that it is the scale of."""

    @property
    def kind(self) -> str:
        """`copied`, `merged`, or `made up` where no source has it."""
        if not self.program.leaves:
            return "made up"
        return "merged" if self.program.steps else "copied"


@dataclass(frozen=True)
class Plan:
    """Everything that will be done."""

    root: Node
    sources: tuple[Source, ...]
    entries: tuple[Entry, ...]
    casts: frozenset[str]
    """Names of tensors whose dtype changes."""
    notes: tuple[str, ...] = ()
    """What a user should know before starting."""
    extra: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many tensors of a source are used nowhere."""

    @cached_property
    def metas(self) -> dict[str, TensorMeta]:
        """The output's tensors."""
        return {entry.name: entry.meta for entry in self.entries}

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Which entry a tensor is."""
        return {entry.name: number for number, entry in enumerate(self.entries)}

    @cached_property
    def value_bytes(self) -> int:
        """Size of the output's values."""
        return self.entries[-1].offset + self.entries[-1].meta.bytes if self.entries else 0

    @cached_property
    def bytes_read(self) -> int:
        """Size of the inputs' values that go into the output, each counted once."""
        total = 0
        for entry in self.entries:
            for leaf in entry.program.leaves:
                if leaf.source is not None:
                    total += self.sources[leaf.source].store.metas[entry.name].bytes
        return total

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """The bytes before the values: they end at a multiple of `ALIGNMENT`."""
        table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        for entry in self.entries:
            table[entry.called or entry.name] = {
                "dtype": DTYPE_NAMES[entry.meta.dtype],
                "shape": list(entry.meta.shape),
                "data_offsets": [entry.offset, entry.offset + entry.meta.bytes],
            }
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


Resolve = Callable[[MergeMethod, str], MergeMethod]
"""A method with the numbers that it has for the tensor of a name."""


def make_plan(
    root: Node,
    *,
    dtype: str = "keep",
    missing: str = "refuse",
    optional: Collection[str] = (),
    component: Callable[[str], str | None] = lambda name: None,
    resolve: Resolve = lambda method, name: method,
    scaled: Scaled | None = None,
) -> Plan:
    """Check that the sources go together, and lay the work out.

    Args:
        root: the graph.
        dtype: of the output's floating-point tensors: one of `FLOATS`, or `keep` for that of the first source.
        missing: a tensor that some source lacks is an error (`refuse`), or comes from the first that has it (`take`).
        optional: names that are taken from the first source that has them in any case.
        component: the component that the tensor of a name belongs to, for `Select`.
        resolve: fills in the numbers that vary.
        scaled: tensors that become 8-bit floats with a scale beside them, whatever `dtype` says.

    Raises:
        ConfigError: the graph gives no checkpoint.
        DataError: sources with different names or shapes; the message shows the first few.
    """
    if root.space is not Space.WEIGHT:
        raise ConfigError(f"{root.name}: the result is a difference, not a checkpoint; add it to one")
    used = tuple(sources(root))
    compiler = _Compiler(used, component, resolve, missing == "take", optional)
    wanted: list[Entry] = []
    casts: set[str] = set()
    for name in dict.fromkeys(name for source in used if source.space is Space.WEIGHT for name in source.store.metas):
        made = compiler.program(root, name)
        if made is None:
            continue
        program, meta, channels = made
        kept = dtype == "keep" or not meta.dtype.is_floating_point
        out = TensorMeta(meta.shape, meta.dtype if kept else FLOATS[dtype])
        if scaled is not None and name in scaled.weights:
            out, program = TensorMeta(meta.shape, DTYPE), program.then(Scaling())
            scale = name.removesuffix(WEIGHT) + SCALE
            wanted.append(Entry(scale, TensorMeta((), torch.float32), MADE_UP, 0, scale_of=name))
        if out.dtype != meta.dtype:
            casts.add(name)
        wanted.append(Entry(name, out, program, 0, channels))
    compiler.refuse()
    if not wanted:
        raise DataError(f"{root.name}: no tensor would be written; check which components are taken")
    if scaled is not None:
        wanted.append(Entry(scaled.mark, MARK, MADE_UP, 0))
    entries: list[Entry] = []
    offset = 0
    for entry in sorted(wanted, key=lambda entry: -entry.meta.dtype.itemsize):
        entries.append(replace(entry, offset=offset))
        offset += entry.meta.bytes
    return Plan(root, used, tuple(entries), frozenset(casts), tuple(compiler.notes), compiler.unused(entries))


class _Compiler:
    """Makes the program of each name, and collects what does not go together."""

    def __init__(
        self,
        used: Sequence[Source],
        component: Callable[[str], str | None],
        resolve: Resolve,
        take: bool,
        optional: Collection[str],
    ) -> None:
        self.used = used
        self.index = {id(source): index for index, source in enumerate(used)}
        self.component = component
        self.resolve = resolve
        self.take = take
        self.optional = optional
        self.lacking: dict[str, dict[str, None]] = {}
        """Names of tensors by the source that has not got them."""
        self.shapes: dict[str, str] = {}
        """Names of tensors of which sources have several shapes, and which."""
        self.taken: Counter[str] = Counter()
        self.met = [set[str]() for _ in used]
        """Names of tensors that the graph asks a source for, whether or not their numbers count."""
        self.framed: list[str] = []
        self.programs: dict[Program, Program] = {}

    def program(self, root: Node, name: str) -> tuple[Program, TensorMeta, int | None] | None:
        """The program for `name`, the shape and dtype of its first source, and the channels that are merged."""
        leaves: list[Leaf] = []
        steps: list[tuple[MergeMethod, tuple[object, ...]]] = []
        slots: dict[object, object] = {}
        alike = len({source.store.metas[name].shape for source in self.used if name in source.store.metas}) == 1

        def visit(node: Node) -> object | None:
            """What stands for `node`: a leaf or the number of a step; None when it has no such tensor."""
            if id(node) in slots:
                return slots[id(node)]
            match node:
                case Source():
                    place = None
                    if name in node.store.metas:
                        place = Leaf(self.index[id(node)])
                        leaves.append(place)
                        self.met[self.index[id(node)]].add(name)
                case Select():
                    chosen = node.components.get(self.component(name) or "", node.otherwise)
                    place = visit(chosen) if chosen is not None else None
                    if place is None and chosen not in (None, node.otherwise):
                        place = visit(node.otherwise)  # what the other would have given
                        if place is not None:
                            self._lacks(chosen, name)
                            self.taken[node.name] += 1
                case Apply():
                    place = self._apply(node, name, [visit(below) for below in node.inputs], steps, alike)
            slots[id(node)] = place
            return place

        place = visit(root)
        if place is None:  # such as a difference from a base that has not got it
            leaves = [leaf for leaf in leaves if self.used[leaf.source or 0].space is Space.WEIGHT][:1]
            if not leaves:
                return None
            place = leaves[0]
        program, metas = self._linear(place, steps, name)
        first = self._meta(leaves[0], name)
        if not first.dtype.is_floating_point or any(not meta.dtype.is_floating_point for meta in metas):
            program = Program((leaves[0],), ())  # counters and positions are no weights
            return self.programs.setdefault(program, program), first, None
        channels = None
        if len({meta.shape for meta in metas}) > 1:
            channels = self._channels(name, program, metas)
        return self.programs.setdefault(program, program), first, channels

    def _apply(
        self,
        node: Apply,
        name: str,
        inputs: list[object | None],
        steps: list[tuple[MergeMethod, tuple[object, ...]]],
        alike: bool,
    ) -> object | None:
        """What stands for `node` made of `inputs`: one of them, or a step that is added to `steps`."""
        if all(place is None for place in inputs):
            return None
        weights = [place for place, below in zip(inputs, node.inputs, strict=True) if below.space is Space.WEIGHT]
        if None in weights:
            present = next((place for place in weights if place is not None), None)
            for below, place in zip(node.inputs, inputs, strict=True):
                if place is None and below.space is Space.WEIGHT:
                    self._lacks(below, name)
            self.taken[node.name] += 1
            return present if node.space is Space.WEIGHT else None
        deltas = [place for place, below in zip(inputs, node.inputs, strict=True) if below.space is Space.DELTA]
        if len(weights) == 1 and node.space is Space.WEIGHT and deltas and all(place is None for place in deltas):
            return weights[0]  # nothing is added to it
        method = self.resolve(node.method, name)
        unchanged = method.unchanged() if alike else None
        if unchanged is not None and inputs[unchanged] is not None:
            return inputs[unchanged]
        filled = tuple(Leaf(None) if place is None else place for place in inputs)
        steps.append((method, filled))
        return len(steps) - 1

    def _lacks(self, node: Node, name: str) -> None:
        """Note which sources of `node` have no tensor `name`, unless that is allowed."""
        for source in sources(node):
            if name not in source.store.metas and not self.take and name not in self.optional:
                self.lacking.setdefault(source.name, {})[name] = None

    def _linear(
        self, place: object, steps: list[tuple[MergeMethod, tuple[object, ...]]], name: str
    ) -> tuple[Program, list[TensorMeta]]:
        """Only what `place` needs, with leaves first."""
        order: list[int] = []
        leaves: list[Leaf] = []

        def visit(item: object) -> None:
            if isinstance(item, Leaf):
                if item not in leaves:
                    leaves.append(item)
                return
            assert isinstance(item, int)
            if item not in order:
                for below in steps[item][1]:
                    visit(below)
                order.append(item)

        visit(place)
        slots: dict[object, int] = {leaf: index for index, leaf in enumerate(leaves)}
        slots |= {step: len(leaves) + index for index, step in enumerate(order)}
        program = Program(
            tuple(leaves),
            tuple(Step(steps[step][0], tuple(slots[item] for item in steps[step][1])) for step in order),
        )
        return program, [self._meta(leaf, name) for leaf in leaves if leaf.source is not None]

    def _meta(self, leaf: Leaf, name: str) -> TensorMeta:
        assert leaf.source is not None
        return self.used[leaf.source].store.metas[name]

    def _channels(self, name: str, program: Program, metas: list[TensorMeta]) -> int | None:
        shapes = [meta.shape for meta in metas]
        alike = {(shape[0], *shape[2:]) for shape in shapes if len(shape) == 4}
        counts = {shape[1] for shape in shapes if len(shape) == 4}
        if all(len(shape) == 4 for shape in shapes) and len(alike) == 1 and counts <= FIRST_CHANNELS:
            shared = LATENT_CHANNELS
            self.framed.append(self._frame(name, program, shapes))
            return shared
        named = [self.used[leaf.source].name for leaf in program.leaves if leaf.source is not None]
        self.shapes[name] = ", ".join(f"{who} {list(shape)}" for who, shape in zip(named, shapes, strict=True))
        return None

    def _frame(self, name: str, program: Program, shapes: list[tuple[int, ...]]) -> str:
        """Which input channels the output has, and whose they are."""
        named = [self.used[leaf.source].name for leaf in program.leaves if leaf.source is not None]
        counts = [shape[1] for shape in shapes]
        first, rest = counts[0], counts[0] - LATENT_CHANNELS
        told = f"{name}: the output has {first} input channels, as {named[0]}, which comes first: {LATENT_CHANNELS} are"
        if rest > 0:
            return f"{told} merged, the other {rest} kept as they are there"
        wide = named[counts.index(max(counts))]
        return f"{told} merged, the other {max(counts) - first} of {wide} left out; name {wide} first to keep them"

    def refuse(self) -> None:
        """Raise when sources do not go together."""
        if self.lacking:
            lists = "; ".join(f"{source}: lacks {_some(list(names))}" for source, names in self.lacking.items())
            raise DataError(
                f"{lists} that others have; say missing = 'take' to take such tensors from the first that has them"
            )
        if self.shapes:
            name, shapes = next(iter(self.shapes.items()))
            raise DataError(
                f"models differ in the shape of {_some(list(self.shapes))} ({name}: {shapes}); they are not of one "
                "architecture, leave out the one that does not belong here"
            )

    @property
    def notes(self) -> list[str]:
        """What is done beside the recipe."""
        notes = list(self.framed)
        if self.take and self.taken:
            notes.append(
                f"{max(self.taken.values())} tensors that some source lacks are taken from the first that has them"
            )
        return notes

    def unused(self, entries: Sequence[Entry]) -> dict[str, int]:
        """How many tensors of each source go nowhere."""
        seen: dict[int, set[str]] = {index: set() for index in range(len(self.used))}
        for entry in entries:
            for leaf in entry.program.leaves:
                if leaf.source is not None:
                    seen[leaf.source].add(entry.name)
        unused: dict[str, int] = {}
        for index, source in enumerate(self.used):
            if source.space is Space.DELTA and (lost := sorted(set(source.store.metas) - self.met[index])):
                if any(lost[0] in other.store.metas for other in self.used if other.space is Space.WEIGHT):
                    raise DataError(
                        f"{source.name}: {_some(lost)} go nowhere, as components are left out or taken from elsewhere; "
                        "leave them out of it with 'tuner translate drop=…'"
                    )
                raise DataError(
                    f"{source.name}: {_some(lost)} are not in the checkpoint that it is added to; it was made for "
                    "another model"
                )
            if count := sum(name not in seen[index] and not name.endswith(POSITIONS) for name in source.store.metas):
                unused[source.name] = count
        return unused


def _some(names: Sequence[str]) -> str:
    """The first few of `names`, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
