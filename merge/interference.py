"""How the changes that several models made to one base get on with each other, before they are merged.

Of every pair of differences from the base, block by block:

- the cosine: 0 where they have nothing to do with each other, so that both can be added in full; towards 1 where they
  did the same, so that a sum does it twice; below 0 where one undoes the other;
- the share of places at which their signs differ, of those that both changed: half by chance;
- the share of each one's strongest places that are also among the other's: `DENSITY` by chance. The fewer there are,
  the more is won by keeping only the strongest, so that the models get out of each other's way;
- the share of those places at which their signs differ: where the models really fight.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge.blocks import Blocks
from merge.compare import Sums, finish, group_of, in_order, percent, some, table
from merge.kinship import Kinship, Relation, likeness, sample
from merge.runs import Runs
from tuner.errors import ConfigError, DataError
from tuner.weights.store import TensorStore

DENSITY = 0.2
"""The share of a tensor's numbers that count as its strongest."""
INDEPENDENT = 0.1
"""Cosines nearer to 0 than that are taken for none."""
FIGHT = 0.3
"""The share of different signs in the strongest common places from which on they are worth a vote."""
NEARLY_ONE = 0.9
"""Differences of a greater cosine are mostly one and the same, such as the way from the base that was given to another
one that the models were really made from."""


@dataclass(frozen=True)
class Meeting:
    """What is counted over some numbers of two differences; sums of two sets of numbers add up."""

    products: float = 0.0
    squares_one: float = 0.0
    squares_other: float = 0.0
    both: int = 0
    """Places that both changed."""
    opposed: int = 0
    """Of those, where the signs differ."""
    strongest_one: int = 0
    """The strongest places of the one."""
    strongest_other: int = 0
    common: int = 0
    """Places that are among the strongest of both."""
    clashes: int = 0
    """Of those, where the signs differ."""

    def __add__(self, other: "Meeting") -> "Meeting":
        return Meeting(
            self.products + other.products,
            self.squares_one + other.squares_one,
            self.squares_other + other.squares_other,
            self.both + other.both,
            self.opposed + other.opposed,
            self.strongest_one + other.strongest_one,
            self.strongest_other + other.strongest_other,
            self.common + other.common,
            self.clashes + other.clashes,
        )

    @property
    def cosine(self) -> float | None:
        """None where one of them changed nothing."""
        norms = math.sqrt(self.squares_one) * math.sqrt(self.squares_other)
        return max(-1.0, min(1.0, self.products / norms)) if norms else None

    @property
    def conflict(self) -> float | None:
        """The share of places with different signs; None where they have no place in common."""
        return self.opposed / self.both if self.both else None

    @property
    def overlap(self) -> float | None:
        """The share of the strongest places that they have in common; None where one of them changed nothing."""
        fewer = min(self.strongest_one, self.strongest_other)
        return self.common / fewer if fewer else None

    @property
    def clash(self) -> float | None:
        """The share of those common places at which signs differ; None where there are none."""
        return self.clashes / self.common if self.common else None


@dataclass(frozen=True)
class Interference:
    """What was found of n models."""

    base: str
    models: tuple[str, ...]
    order: tuple[str, ...]
    """The blocks, or components, as they are shown."""
    changes: Mapping[str, Mapping[str, Sums]]
    """By model and block: the base compared with the model."""
    relations: Mapping[str, Relation]
    """By model: whether it comes from that base."""
    meetings: Mapping[tuple[str, str], Mapping[str, Meeting]]
    """By pair of models and block."""
    left_out: tuple[str, ...] = ()
    """Weights of the base that some model lacks, or has in another shape."""

    def total(self, pair: tuple[str, str]) -> Meeting:
        """The sums of a pair over all blocks."""
        return sum(self.meetings[pair].values(), Meeting())

    @property
    def cosine(self) -> float:
        """The mean over the pairs."""
        cosines = [self.total(pair).cosine or 0.0 for pair in self.meetings]
        return sum(cosines) / len(cosines)

    @property
    def scale(self) -> float:
        """What to multiply the sum of the differences by, so that on the average each is there once: with n
        differences of one length and mean cosine c, their sum reaches 1 + (n - 1) c along each of them.

        Differences that undo each other are not scaled up to make good for it.
        """
        return 1 / (1 + (len(self.models) - 1) * max(0.0, self.cosine))

    @property
    def verdict(self) -> list[str]:
        """What to make of it, a sentence each."""
        return list(_verdict(self))

    def plain(self) -> dict[str, Any]:
        """Everything, as plain data for JSON."""

        def meeting(one: Meeting) -> dict[str, float | None]:
            return {
                "cosine": one.cosine,
                "opposed_signs": one.conflict,
                "strongest_in_common": one.overlap,
                "opposed_signs_of_those": one.clash,
            }

        return {
            "base": self.base,
            "models": {
                model: {
                    "kinship": self.relations[model].kinship.value,
                    "total": sum(blocks.values(), Sums()).plain(),
                    "blocks": {block: sums.plain() for block, sums in blocks.items()},
                }
                for model, blocks in self.changes.items()
            },
            "pairs": [
                {
                    "models": list(pair),
                    "total": meeting(self.total(pair)),
                    "blocks": {block: meeting(one) for block, one in blocks.items()},
                }
                for pair, blocks in self.meetings.items()
            ],
            "left_out": list(self.left_out),
            "density": DENSITY,
            "scale": self.scale,
            "verdict": self.verdict,
        }


def interference(
    base: TensorStore,
    models: Mapping[str, TensorStore],
    name: str = "base",
    progress: Callable[[int], None] = lambda numbers: None,
) -> Interference:
    """Compare what the `models` changed of `base`, in the weights that all of them have in one shape.

    Args:
        models: two or more, by what they are called.
        name: what the base is called.
        progress: told how many numbers of the base have been looked at since it was told last.

    Raises:
        ConfigError: fewer than two models.
        DataError: there are no weights that all of them have.
    """
    if len(models) < 2:
        raise ConfigError("models: one alone cannot interfere with anything; give two or more")
    stores = [base, *models.values()]
    shared = [
        tensor
        for tensor, meta in base.metas.items()
        if meta.dtype.is_floating_point
        and all(tensor in store.metas and store.metas[tensor].shape == meta.shape for store in stores)
    ]
    if not shared:
        raise DataError(f"{name}, {', '.join(models)}: no weights that all of them have in one shape")
    blocks = Blocks.of(base.metas)
    order = in_order([group_of(tensor, blocks) for tensor in shared], blocks)
    changes = {model: dict.fromkeys(order, Sums()) for model in models}
    meetings = {pair: dict.fromkeys(order, Meeting()) for pair in combinations(models, 2)}
    matrices = {
        tensor: component
        for component, tensors in sample(base.metas, {tensor: base.metas[tensor] for tensor in shared}, None).items()
        for tensor in tensors
    }
    alike: dict[str, dict[str, list[Sums]]] = {model: {} for model in models}
    with Runs(stores) as runs:
        for tensor in shared:
            block = group_of(tensor, blocks)
            own, met = _tensor(runs, tensor, list(models), progress)
            for model, sums in own.items():
                changes[model][block] += sums
                if tensor in matrices:
                    alike[model].setdefault(matrices[tensor], []).append(sums)
            for pair, one in met.items():
                meetings[pair][block] += one
    relations = {
        model: Relation({component: likeness(sums) for component, sums in found.items()})
        for model, found in alike.items()
    }
    together = set(shared)
    left_out = tuple(
        tensor for tensor, meta in base.metas.items() if meta.dtype.is_floating_point and tensor not in together
    )
    return Interference(name, tuple(models), order, changes, relations, meetings, left_out)


def _tensor(
    runs: Runs, tensor: str, models: Sequence[str], progress: Callable[[int], None]
) -> tuple[dict[str, Sums], dict[tuple[str, str], Meeting]]:
    """The sums of one tensor, in two passes: how strong the changes are, and then where the strongest are."""
    sums = dict.fromkeys(models, Sums())
    histograms = [torch.zeros(BINS, dtype=torch.int64) for _ in models]
    for base, *others in runs.of(tensor):
        for index, other in enumerate(others):
            histograms[index] += torch.bincount(_strength(_difference(base, other)), minlength=BINS)
            sums[models[index]] += Sums.of(base.clone(), other)
        progress(base.numel())
    least = [_least(histogram) for histogram in histograms]
    met = dict.fromkeys(combinations(models, 2), Meeting())
    for base, *others in runs.of(tensor):
        changes = [_difference(base, other) for other in others]
        strong = [_strength(change) >= bound for change, bound in zip(changes, least, strict=True)]
        for (one, first), (other, second) in combinations(enumerate(models), 2):
            product = changes[one] * changes[other]
            common = strong[one] & strong[other]
            met[first, second] += Meeting(
                products=product.sum().item(),
                squares_one=torch.dot(changes[one], changes[one]).item(),
                squares_other=torch.dot(changes[other], changes[other]).item(),
                both=int(torch.count_nonzero(product)),
                opposed=int(torch.count_nonzero(product < 0)),
                strongest_one=int(strong[one].sum()),
                strongest_other=int(strong[other].sum()),
                common=int(common.sum()),
                clashes=int((common & (product < 0)).sum()),
            )
    return sums, met


BINS = 1 << 15


def _strength(change: Tensor) -> Tensor:
    """How large each number is, as one of `BINS` bins: its magnitude's upper bits, so a bin is less than 1 % wide."""
    return (change.float().view(torch.int32) & 0x7FFFFFFF) >> 16


def _least(histogram: Tensor) -> int:
    """The bin from which on lie the strongest `DENSITY` of a tensor's numbers; what did not change is never among
    them. Numbers of one bin are not parted, so there may be a few more."""
    wanted = math.ceil(DENSITY * int(histogram.sum()))
    from_the_top = histogram.flip(0).cumsum(0)
    return max(1, BINS - 1 - int(torch.searchsorted(from_the_top, wanted)))


def _difference(base: Tensor, other: Tensor) -> Tensor:
    """`other` - `base`, 0 where it is no number."""
    return (other - base).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


# Showing


def _verdict(found: Interference) -> Iterator[str]:
    base = found.base
    for model, relation in found.relations.items():
        if not sum(found.changes[model].values(), Sums()).changed:
            yield f"{model} is {base} itself: there is nothing to merge of it"
        elif relation.kinship in (Kinship.UNRELATED, Kinship.DISTANT):
            yield f"{model} does not come from {base} ({relation}): what differs from it is no change made to it"
    totals = {pair: found.total(pair) for pair in found.meetings}
    mean = f"(mean cosine {found.cosine:.2f})"
    if found.cosine > NEARLY_ONE:
        yield (
            f"the differences from {base} are nearly one and the same {mean}: the models were rather made from another "
            "base; give that one, or mix the models themselves"
        )
    elif all(abs(one.cosine or 0.0) <= INDEPENDENT for one in totals.values()):
        yield "the differences have nothing to do with each other: their plain sum keeps each in full"
    elif found.cosine > 0:
        yield (
            f"the differences share a direction {mean}: their plain sum makes too much of it; multiplied by "
            f"{found.scale:.2f}, each is there once"
        )
    for (one, other), met in totals.items():
        if met.cosine is not None and met.cosine < -INDEPENDENT:
            yield f"{one} and {other} undo each other (cosine {met.cosine:.2f}): choose one, or one for each block"
        elif (met.overlap or 0.0) > 1.5 * DENSITY and (met.clash or 0.0) > FIGHT:
            yield (
                f"{one} and {other} are strong in the same places ({_share(met.overlap)} of them) and differ in sign "
                f"at {_share(met.clash)} of those: let signs be elected (ties)"
            )
        worst = [(met.cosine, block) for block, met in found.meetings[one, other].items() if met.cosine is not None]
        if worst and min(worst)[0] < -INDEPENDENT and (met.cosine or 0.0) >= -INDEPENDENT:
            yield f"{one} and {other} undo each other in {min(worst)[1]} (cosine {min(worst)[0]:.2f})"


def describe(found: Interference) -> str:
    """What was found, as text: tables of the models, the pairs and the blocks, and what to make of it."""
    return "\n".join(_lines(found))


def _lines(found: Interference) -> Iterator[str]:
    yield f"{', '.join(found.models)} as changes of {found.base}"
    rows = [("model", "difference", "cosine", "changed", "")]
    for model, blocks in found.changes.items():
        total = sum(blocks.values(), Sums())
        cells = (_share(total.relative), _cosine(total.cosine), percent(total.share_changed))
        rows.append((model, *cells, found.relations[model].kinship.value))
    yield from table(rows)
    yield ""
    pairs = list(found.meetings)
    heads = ("cosine", "other sign", "strongest in common", "other sign of those")
    rows = [("pair of differences", *heads)]
    rows += [(f"{one}, {other}", *_cells(found.total((one, other)))) for one, other in pairs]
    rows.append(("by chance", _cosine(0.0), percent(0.5), percent(DENSITY), percent(0.5)))
    yield from table(rows)
    yield ""
    alone = len(pairs) == 1
    rows = [("block", *found.models, *(heads if alone else [f"{one}, {other}" for one, other in pairs]))]
    for block in found.order:
        own = [_share(found.changes[model][block].relative) for model in found.models]
        met = [found.meetings[pair][block] for pair in pairs]
        rows.append((block, *own, *(_cells(met[0]) if alone else [_cosine(one.cosine) for one in met])))
    yield from table(rows)
    if found.left_out:
        yield f"not compared, as not all have them in one shape: {some(found.left_out)}"
    bad = {model: sum(blocks.values(), Sums()).non_finite_b for model, blocks in found.changes.items()}
    yield from (f"{model} has {count:,} NaN or infinite numbers, left out" for model, count in bad.items() if count)
    yield "of models: the difference from the base; of pairs: the cosine of the differences"
    yield ""
    yield from found.verdict


def _cells(met: Meeting) -> tuple[str, ...]:
    return _cosine(met.cosine), _share(met.conflict), _share(met.overlap), _share(met.clash)


def _share(share: float | None) -> str:
    return "-" if share is None else percent(share)


def _cosine(cosine: float | None) -> str:
    return "-" if cosine is None else f"{cosine:.3f}"


def plot(found: Interference, path: Path) -> None:
    """Draw the models' differences, and the cosines of their pairs, over the blocks into the PNG file `path`.

    Raises:
        ResourceError: it cannot be written.
    """
    from matplotlib.figure import Figure

    places = range(len(found.order))
    figure = Figure(figsize=(max(8.0, 2.0 + 0.36 * len(found.order)), 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(found.models)
    for index, model in enumerate(found.models):
        heights = [100 * (found.changes[model][block].relative or 0.0) for block in found.order]
        above.bar([place - 0.4 + (index + 0.5) * width for place in places], heights, width, label=model)
    above.set(ylabel="difference from the base in %", xlim=(-0.7, len(found.order) - 0.3))
    above.set_title(f"changes of {found.base}", loc="left", fontsize=10)
    below.axhspan(-INDEPENDENT, INDEPENDENT, color="0.93")
    below.axhline(0, color="0.6", linewidth=0.8)
    for index, (one, other) in enumerate(found.meetings):
        cosines = [found.meetings[one, other][block].cosine for block in found.order]
        shown = [(place, cosine) for place, cosine in zip(places, cosines, strict=True) if cosine is not None]
        colour = f"C{len(found.models) + index}"
        below.plot([x for x, _ in shown], [y for _, y in shown], "o", color=colour, ms=4, label=f"{one}, {other}")
    below.set(ylabel="cosine of the differences", ylim=(-1.05, 1.05))
    below.set_xticks(places, found.order, rotation=90)
    finish(figure, path)
