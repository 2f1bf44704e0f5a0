"""Whether checkpoints come from one base, so that their numbers mean the same and may be mixed.

Two networks that were trained apart have unrelated numbers: even where they do the same, their features stand in
another order. Their average is noise. Two fine-tunes of one network stay close to it, and to each other. The difference
is so large that a few numbers of a few tensors tell it.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from merge.blocks import Blocks
from merge.compare import OTHER, Sums
from merge.runs import Runs
from tuner.weights.store import TensorMeta, TensorStore

NUMBERS = 1 << 16
"""How much is read of a tensor."""
LEAST_NUMBERS = 1 << 10
"""Smaller tensors tell too little: the cosine of n unrelated numbers is 0 ± 1/√n, here 0.03."""
LEAST_TENSORS = 3
"""With fewer, nothing is said of a component."""
UNRELATED = 0.2
"""The median cosine below which networks are unrelated: more than six times what chance makes of a single tensor."""
ONE_BASE = 0.8
"""The median cosine above which they are of one base. A change of a tenth of the weights' norm leaves 0.995, and one of
0.6 leaves about 0.8; fine-tunes mostly lie above 0.99. Between the two numbers lie networks of which one was trained on
for so long that little of the other is left."""


class Kinship(Enum):
    """What can be said."""

    ONE_BASE = "of one base"
    DISTANT = "far apart"
    UNRELATED = "unrelated"
    UNKNOWN = "unknown"

    @property
    def worry(self) -> int:
        """The worse, the more."""
        return [Kinship.UNKNOWN, Kinship.ONE_BASE, Kinship.DISTANT, Kinship.UNRELATED].index(self)


@dataclass(frozen=True)
class Likeness:
    """How alike one component of two checkpoints is."""

    cosine: float
    """The median over tensors."""
    relative: float
    """‖b - a‖ / ‖a‖, the median over tensors."""
    tensors: int
    """How many were looked at."""

    @property
    def kinship(self) -> Kinship:
        """What follows."""
        if self.tensors < LEAST_TENSORS:
            return Kinship.UNKNOWN
        if self.cosine < UNRELATED:
            return Kinship.UNRELATED
        return Kinship.ONE_BASE if self.cosine > ONE_BASE else Kinship.DISTANT


@dataclass(frozen=True)
class Relation:
    """How alike two checkpoints are, by component: models of one base may well have unrelated autoencoders."""

    components: Mapping[str, Likeness]

    @property
    def kinship(self) -> Kinship:
        """That of the component that is furthest off."""
        found = [likeness.kinship for likeness in self.components.values()]
        return max(found, key=lambda kinship: kinship.worry, default=Kinship.UNKNOWN)

    def those(self, kinship: Kinship) -> list[str]:
        """The components of which that is said."""
        return [component for component, likeness in self.components.items() if likeness.kinship is kinship]

    def __str__(self) -> str:
        """Such as `unet: unrelated (cosine 0.01)`."""
        if self.kinship is Kinship.UNKNOWN:
            return "too few weights in common to tell"
        found = {component: self.components[component] for component in self.those(self.kinship)}
        return ", ".join(f"{name}: {one.kinship.value} (cosine {one.cosine:.3g})" for name, one in found.items())


def same_base(a: TensorStore, b: TensorStore, base: TensorStore | None = None, samples: int = 12) -> Relation:
    """Whether `a` and `b` come from one base, from a sample of their weights.

    Some matrices are looked at: a scale or bias is much alike in all networks. Of each some 100 kB are read.

    Args:
        base: where given, what counts is how far each of the two is from it; the worse of the two is told.
        samples: how many tensors of each component to look at.
    """
    if base is None:
        return _relation(a, b, samples)
    relations = [_relation(base, store, samples) for store in (a, b)]
    components = dict.fromkeys(component for relation in relations for component in relation.components)
    return Relation(
        {
            component: max(
                (relation.components[component] for relation in relations if component in relation.components),
                key=lambda likeness: (likeness.kinship.worry, -likeness.cosine),
            )
            for component in components
        }
    )


def _relation(a: TensorStore, b: TensorStore, samples: int) -> Relation:
    chosen = sample(a.metas, b.metas, samples)
    found: dict[str, list[Sums]] = defaultdict(list)
    with Runs([a, b]) as runs:
        for component, names in chosen.items():
            for name in names:
                for numbers_a, numbers_b in runs.of(name, limit=NUMBERS):
                    found[component].append(Sums.of(numbers_a, numbers_b))
    return Relation({component: likeness(sums) for component, sums in found.items()})


def likeness(tensors: Iterable[Sums]) -> Likeness:
    """What the sums of some tensors say; those where one of the two is zero throughout say nothing."""
    told = [(sums.cosine, sums.relative) for sums in tensors]
    cosines = [cosine for cosine, _ in told if cosine is not None]
    if not cosines:
        return Likeness(0.0, 0.0, 0)
    relatives = [relative for cosine, relative in told if cosine is not None and relative is not None]
    return Likeness(statistics.median(cosines), statistics.median(relatives), len(cosines))


def sample(one: Mapping[str, TensorMeta], other: Mapping[str, TensorMeta], samples: int | None) -> dict[str, list[str]]:
    """Up to `samples` weight matrices of each component, evenly from the first to the last of the file; None: all."""
    blocks = Blocks.of(one)
    names: dict[str, list[str]] = defaultdict(list)
    for name, meta in one.items():
        numbers = 1
        for size in meta.shape:
            numbers *= size
        alike = name in other and other[name].shape == meta.shape
        if alike and meta.dtype.is_floating_point and len(meta.shape) > 1 and numbers >= LEAST_NUMBERS:
            names[blocks.component(name) or OTHER].append(name)
    if samples is None:
        return dict(names)
    return {component: _evenly(found, samples) for component, found in names.items()}


def _evenly(names: list[str], count: int) -> list[str]:
    if len(names) <= count:
        return names
    return [names[(2 * index + 1) * len(names) // (2 * count)] for index in range(count)]
