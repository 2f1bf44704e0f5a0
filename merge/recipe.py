"""What to merge: a frozen graph of checkpoints and methods.

    a, b, base = Source("a", open_store(...)), Source("b", ...), Source("base", ...)
    blend = Apply("blend", Lerp(t=0.3), (a, b))
    moved = base + 0.8 * (a - base)

Spaces are checked as the graph is built: adding two checkpoints is refused, adding a difference is not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge.methods.base import MergeMethod, Space
from tuner.errors import ConfigError
from tuner.weights.store import TensorStore

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Arithmetic:
    """Operators that build the graph."""

    def __sub__(self: "Node", other: "Node") -> "Apply":  # pyright: ignore[reportGeneralTypeIssues]
        """The difference of two checkpoints."""
        from merge.methods.subtract import Subtract

        return Apply(f"({self.name} - {other.name})", Subtract(), (self, other))

    def __add__(self: "Node", other: "Node") -> "Apply":  # pyright: ignore[reportGeneralTypeIssues]
        """A checkpoint with a difference added."""
        from merge.methods.add import Add

        return Apply(f"({self.name} + {other.name})", Add(), (self, other))

    def __rmul__(self: "Node", factor: float) -> "Apply":  # pyright: ignore[reportGeneralTypeIssues]
        """Everything times `factor`."""
        from merge.methods.scale import Scale

        return Apply(f"{factor} * {self.name}", Scale(factor=factor), (self,))


@dataclass(frozen=True, eq=False)
class Source(_Arithmetic):
    """A checkpoint, or a LoRA file, whose space is `DELTA`."""

    name: str
    store: TensorStore
    space: Space = Space.WEIGHT
    origin: TensorStore | None = None
    """Where tensors are computed from what lies in files: that."""
    beside: tuple[Path, ...] = ()
    """Other files that decide what the tensors are, such as peft's config with a LoRA's alpha."""

    @property
    def inputs(self) -> tuple["Node", ...]:
        """Nothing lies below a source."""
        return ()


@dataclass(frozen=True, eq=False)
class Apply(_Arithmetic):
    """A method applied to other nodes.

    Raises:
        ConfigError: the wrong number of inputs, or of another space than the method takes.
    """

    name: str
    method: MergeMethod
    inputs: tuple["Node", ...]

    def __post_init__(self) -> None:
        method, given = self.method, len(self.inputs)
        kind = type(method).__name__
        least = len(method.takes)
        if given < least or (given > least and not method.repeats):
            wanted = f"{least} or more" if method.repeats else str(least)
            raise ConfigError(f"{self.name}: {kind} takes {wanted} inputs, got {given}")
        for setting in method.per_input:
            values: tuple[object, ...] = getattr(method, setting, ())
            if values and len(values) != given:
                raise ConfigError(
                    f"{self.name}: {setting}: {len(values)} of them for {given} inputs; give one for each"
                )
        either: Space | None = None
        for index, node in enumerate(self.inputs):
            wanted = method.takes[min(index, least - 1)]
            if wanted is Space.EITHER:
                either = either or node.space
                if node.space is not either:
                    raise ConfigError(
                        f"{self.name}: {kind} takes checkpoints or differences, not both, but {node.name!r} is a "
                        f"{node.space.value} and {self.inputs[0].name!r} is not"
                    )
            elif node.space is not wanted:
                remedy = (
                    "subtract its base from it, or say 'base'"
                    if wanted is Space.DELTA
                    else "add it to a checkpoint first"
                )
                raise ConfigError(
                    f"{self.name}: {kind} takes a {wanted.value} as input {index + 1}, "
                    f"but {node.name!r} is a {node.space.value}; {remedy}"
                )

    @property
    def space(self) -> Space:
        """What the result means."""
        if self.method.gives is not Space.EITHER:
            return self.method.gives
        pairs = zip(self.inputs, [*self.method.takes, *[self.method.takes[-1]] * len(self.inputs)], strict=False)
        return next(node.space for node, taken in pairs if taken is Space.EITHER)


@dataclass(frozen=True, eq=False)
class Select(_Arithmetic):
    """Another node for each component: `{"vae": b}` takes b's autoencoder; None leaves a component out."""

    name: str
    otherwise: "Node"
    components: Mapping[str, "Node | None"]

    def __post_init__(self) -> None:
        for component, node in self.components.items():
            if node is not None and node.space is not self.otherwise.space:
                raise ConfigError(f"{self.name}: {component}: {node.name!r} is a {node.space.value}")

    @property
    def space(self) -> Space:
        """What the result means."""
        return self.otherwise.space

    @property
    def inputs(self) -> tuple["Node", ...]:
        """What may be taken."""
        return (self.otherwise, *(node for node in self.components.values() if node is not None))


Node = Source | Apply | Select


def ordered(root: Node) -> list[Node]:
    """Every node under `root`, inputs before those that use them, each once."""
    seen: set[int] = set()

    def visit(node: Node) -> Iterator[Node]:
        if id(node) not in seen:
            seen.add(id(node))
            for below in node.inputs:
                yield from visit(below)
            yield node

    return list(visit(root))


def sources(root: Node) -> list[Source]:
    """The checkpoints and LoRAs under `root`, in the order of their use."""
    return [node for node in ordered(root) if isinstance(node, Source)]


def on_base(name: str, method: MergeMethod, base: Node, inputs: "Sequence[Node]") -> Apply:
    """base + method(differences): checkpoints among `inputs` have `base` subtracted first."""
    deltas = tuple(node - base if node.space is Space.WEIGHT else node for node in inputs)
    return base + Apply(name, method, deltas)
