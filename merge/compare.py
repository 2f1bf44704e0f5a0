"""How two checkpoints differ: tensor by tensor, block by block, and in all.

Everything is summed in float64 over runs of numbers, so that checkpoints of any size need a few megabytes. Tensors of
whole numbers, such as positions, are no weights: of them is said only which differ.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from merge.blocks import Blocks
from merge.runs import Runs
from tuner.errors import DataError
from tuner.weights.store import DTYPE_NAMES, TensorStore
from tuner.weights.writer import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHER = "other"
"""Stands for a block where a tensor is in none, and in no component."""


@dataclass(frozen=True)
class Sums:
    """What is counted over some numbers of two tensors a and b; sums of two sets of numbers add up."""

    numbers: int = 0
    products: float = 0.0
    """Σ a b, as the next three without the places where a or b is NaN or infinite."""
    squares_a: float = 0.0
    squares_b: float = 0.0
    squares_d: float = 0.0
    """Σ (b - a)²."""
    changed: int = 0
    """Places where a and b differ."""
    opposed: int = 0
    """Places where one is above 0 and the other below."""
    largest: float = 0.0
    """The largest |b - a|."""
    non_finite_a: int = 0
    """NaN and infinities in a."""
    non_finite_b: int = 0

    @staticmethod
    def of(a: Tensor, b: Tensor) -> "Sums":
        """Those of two flat float64 tensors of one length, which are overwritten where they hold NaN or infinities."""
        squares_a, squares_b = torch.dot(a, a).item(), torch.dot(b, b).item()
        bad_a = bad_b = odd = 0
        if not math.isfinite(squares_a) or not math.isfinite(squares_b):
            wrong_a, wrong_b = ~torch.isfinite(a), ~torch.isfinite(b)
            bad_a, bad_b = int(wrong_a.sum()), int(wrong_b.sum())
            wrong = wrong_a | wrong_b
            odd = int(((a != b) & ~(a.isnan() & b.isnan()) & wrong).sum())
            a[wrong] = 0
            b[wrong] = 0
            squares_a, squares_b = torch.dot(a, a).item(), torch.dot(b, b).item()
        difference = b - a
        return Sums(
            numbers=a.numel(),
            products=torch.dot(a, b).item(),
            squares_a=squares_a,
            squares_b=squares_b,
            squares_d=torch.dot(difference, difference).item(),
            changed=int(torch.count_nonzero(difference)) + odd,
            opposed=int(torch.count_nonzero(a * b < 0)),
            largest=max(difference.max().item(), -difference.min().item()) if a.numel() else 0.0,
            non_finite_a=bad_a,
            non_finite_b=bad_b,
        )

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.numbers + other.numbers,
            self.products + other.products,
            self.squares_a + other.squares_a,
            self.squares_b + other.squares_b,
            self.squares_d + other.squares_d,
            self.changed + other.changed,
            self.opposed + other.opposed,
            max(self.largest, other.largest),
            self.non_finite_a + other.non_finite_a,
            self.non_finite_b + other.non_finite_b,
        )

    @property
    def cosine(self) -> float | None:
        """Σ a b / (‖a‖ ‖b‖), exact to the last digits also near 1; None where a or b is zero."""
        norm_a, norm_b = math.sqrt(self.squares_a), math.sqrt(self.squares_b)
        if not norm_a or not norm_b:
            return None
        cosine = self.products / (norm_a * norm_b)
        if cosine < 0.5:
            return max(cosine, -1.0)
        return 1 - max(0.0, self.squares_d - (norm_a - norm_b) ** 2) / (2 * norm_a * norm_b)

    @property
    def relative(self) -> float | None:
        """‖b - a‖ / ‖a‖; None where a is zero and b is not."""
        if not self.squares_d:
            return 0.0
        return math.sqrt(self.squares_d / self.squares_a) if self.squares_a else None

    @property
    def share_changed(self) -> float:
        """The share of places where a and b differ."""
        return self.changed / self.numbers if self.numbers else 0.0

    @property
    def share_opposed(self) -> float:
        """The share of places where a and b have different signs."""
        return self.opposed / self.numbers if self.numbers else 0.0

    def plain(self) -> dict[str, float | int | None]:
        """As plain data."""
        return {
            "numbers": self.numbers,
            "relative_difference": self.relative,
            "cosine": self.cosine,
            "changed": self.share_changed,
            "opposed_signs": self.share_opposed,
            "largest_difference": self.largest,
            "non_finite_a": self.non_finite_a,
            "non_finite_b": self.non_finite_b,
        }


@dataclass(frozen=True)
class Comparison:
    """What was found."""

    names: tuple[str, str]
    """What the two are called."""
    tensors: Mapping[str, Sums]
    """Of every tensor of weights that both have in one shape."""
    group: Mapping[str, str]
    """The block of each, or its component, or `OTHER`."""
    order: tuple[str, ...]
    """The groups, as they are shown."""
    only: tuple[tuple[str, ...], tuple[str, ...]]
    """Names that the other has not."""
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Of tensors that have different ones; they are not compared."""
    dtypes: Mapping[str, tuple[str, str]]
    """Of tensors that have different ones; they are compared all the same."""
    whole_numbers: tuple[str, ...]
    """Tensors of whole numbers that differ."""

    @property
    def groups(self) -> dict[str, Sums]:
        """The sums of each group, in order."""
        sums = {group: Sums() for group in self.order}
        for name, own in self.tensors.items():
            sums[self.group[name]] += own
        return sums

    @property
    def total(self) -> Sums:
        """The sums over everything."""
        return sum(self.groups.values(), Sums())

    @property
    def identical(self) -> bool:
        """Whether nothing differs but dtypes."""
        return not (self.total.changed or any(self.only) or self.shapes or self.whole_numbers)

    def plain(self) -> dict[str, Any]:
        """Everything, as plain data for JSON."""
        return {
            "models": list(self.names),
            "total": self.total.plain(),
            "blocks": {group: sums.plain() for group, sums in self.groups.items()},
            "tensors": {name: {"block": self.group[name], **sums.plain()} for name, sums in self.tensors.items()},
            "only": {name: list(names) for name, names in zip(self.names, self.only, strict=True)},
            "shapes": {name: [list(shape) for shape in pair] for name, pair in self.shapes.items()},
            "dtypes": {name: list(pair) for name, pair in self.dtypes.items()},
            "whole_numbers": list(self.whole_numbers),
        }


def compare(
    a: TensorStore,
    b: TensorStore,
    names: tuple[str, str] = ("a", "b"),
    progress: Callable[[int], None] = lambda numbers: None,
) -> Comparison:
    """Compare `b` with `a`.

    Args:
        names: what they are called, in what is shown.
        progress: told how many numbers have been compared since it was told last.

    Raises:
        DataError: they have no tensor in common.
    """
    metas_a, metas_b = a.metas, b.metas
    common = [name for name in metas_a if name in metas_b]
    if not common:
        raise DataError(
            f"{names[0]} and {names[1]} have no tensor in common: {_example(metas_a)} in one, {_example(metas_b)} in "
            "the other; they are of different networks, or in different layouts"
        )
    blocks = Blocks.of(metas_a)
    shapes = {
        name: (metas_a[name].shape, metas_b[name].shape)
        for name in common
        if metas_a[name].shape != metas_b[name].shape
    }
    alike = [name for name in common if name not in shapes]
    tensors: dict[str, Sums] = {}
    whole_numbers: list[str] = []
    with Runs([a, b]) as runs:
        for name in alike:
            sums = Sums()
            for numbers_a, numbers_b in runs.of(name):
                sums += Sums.of(numbers_a, numbers_b)
                progress(numbers_a.numel())
            if metas_a[name].dtype.is_floating_point:
                tensors[name] = sums
            elif sums.changed:
                whole_numbers.append(name)
    group = {name: group_of(name, blocks) for name in tensors}
    return Comparison(
        names,
        tensors,
        group,
        in_order(group.values(), blocks),
        only=(
            tuple(name for name in metas_a if name not in metas_b),
            tuple(name for name in metas_b if name not in metas_a),
        ),
        shapes=shapes,
        dtypes={
            name: (DTYPE_NAMES[metas_a[name].dtype], DTYPE_NAMES[metas_b[name].dtype])
            for name in common
            if metas_a[name].dtype != metas_b[name].dtype
        },
        whole_numbers=tuple(whole_numbers),
    )


def group_of(name: str, blocks: Blocks) -> str:
    """What the tensor `name` is shown under."""
    return blocks.block(name) or blocks.component(name) or OTHER


def in_order(groups: Iterable[str], blocks: Blocks) -> tuple[str, ...]:
    """Every one of `groups` once: blocks in the order of the network, and then the others by name."""
    found = set(groups)
    return (*(block for block in blocks.names if block in found), *sorted(found - set(blocks.names)))


# Showing


def describe(comparison: Comparison, tensors: int = 10) -> str:
    """The comparison as text: a table of the blocks, the `tensors` that differ most, and what cannot be compared."""
    return "\n".join(_lines(comparison, tensors))


def _lines(comparison: Comparison, tensors: int) -> Iterator[str]:
    a, b = comparison.names
    yield f"{b} compared with {a}"
    if comparison.identical:
        yield "identical: every number is the same"
    elif comparison.tensors:
        counts = Counter(comparison.group.values())
        head = ("block", "tensors", "numbers", "difference", "cosine", "changed", "other sign", "largest")
        rows = [(group, str(counts[group]), *_cells(sums)) for group, sums in comparison.groups.items()]
        yield from table([head, *rows, ("all", str(len(comparison.tensors)), *_cells(comparison.total))])
        yield f"difference: ‖{b} - {a}‖ / ‖{a}‖; other sign: the share of numbers above 0 in one and below in the other"
        changed = [name for name, sums in comparison.tensors.items() if sums.changed]
        ranked = sorted(changed, key=lambda name: -_or_infinite(comparison.tensors[name].relative))[:tensors]
        if ranked:
            yield f"what differs most, of {len(changed)} tensors that differ:"
            yield from (f"  {_difference(comparison.tensors[name]):>10}  {name}" for name in ranked)
    for which, names in zip(comparison.names, comparison.only, strict=True):
        if names:
            yield f"only in {which}: {some(names)}"
    for name, (one, other) in list(comparison.shapes.items())[:5]:
        yield f"not compared: {name} is {list(one)} in {a} and {list(other)} in {b}"
    if len(comparison.shapes) > 5:
        yield f"not compared: {len(comparison.shapes) - 5} more tensors of different shapes"
    for pair, count in Counter(comparison.dtypes.values()).items():
        yield f"{count} tensors are {pair[0]} in {a} and {pair[1]} in {b}"
    if comparison.whole_numbers:
        yield f"whole numbers that differ: {some(comparison.whole_numbers)}"
    for which, field in ((a, "non_finite_a"), (b, "non_finite_b")):
        bad = {name: getattr(sums, field) for name, sums in comparison.tensors.items() if getattr(sums, field)}
        if bad:
            yield f"{which} has {sum(bad.values()):,} NaN or infinite numbers, left out of the sums: {some(list(bad))}"


def _cells(sums: Sums) -> tuple[str, ...]:
    return (
        _count(sums.numbers),
        _difference(sums),
        "-" if sums.cosine is None else f"{sums.cosine:.6f}",
        percent(sums.share_changed),
        percent(sums.share_opposed),
        f"{sums.largest:.3g}",
    )


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines with columns: the first of them to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *cells in rows:
        line = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield f"{first:<{widths[0]}}  {line}"


def percent(share: float) -> str:
    """A share of 1 as text; what is not nothing does not look like it."""
    return "<0.01 %" if 0 < share < 5e-5 else f"{100 * share:.2f} %"


def _difference(sums: Sums) -> str:
    return "-" if sums.relative is None else percent(sums.relative)


def _or_infinite(number: float | None) -> float:
    return math.inf if number is None else number


def _count(numbers: int) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if numbers >= scale:
            return f"{numbers / scale:.2f} {unit}"
    return str(numbers)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _example(names: Iterable[str]) -> str:
    return repr(next(iter(names), "nothing"))


def plot(comparison: Comparison, path: Path) -> None:
    """Draw the differences over the blocks into the PNG file `path`, whole or not at all.

    Raises:
        ResourceError: it cannot be written.
    """
    from matplotlib.figure import Figure

    groups = comparison.groups
    places = list(range(len(groups)))
    figure = Figure(figsize=(max(8.0, 2.0 + 0.36 * len(groups)), 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    bars = [100 * (sums.relative or 0.0) for sums in groups.values()]
    above.bar(places, bars, width=0.8, color="#9ecae1", label="block")
    dots = _dots(comparison)
    usual = float(np.quantile([y for _, y in dots], 0.98)) if dots else 0.0
    top = 1.1 * max(usual, *bars) or 1.0
    within = [(x, y) for x, y in dots if y <= top]
    above.plot(*_columns(within), ".", color="0.25", markersize=2.5, label="tensor")
    if len(within) < len(dots):  # a few numbers that were almost 0 would hide everything else
        outside = [(x, 0.985 * top) for x, y in dots if y > top]
        above.plot(*_columns(outside), "^", color="C3", markersize=3, label="tensor, above the scale")
    above.set(ylabel="difference: ‖b - a‖ / ‖a‖ in %", ylim=(0, top), xlim=(-0.7, len(groups) - 0.3))
    above.set_title(f"a: {comparison.names[0]}\nb: {comparison.names[1]}", loc="left", fontsize=10)
    below.set(ylabel="numbers in %", yscale="log", ylim=(0.009, 150), yticks=(0.01, 0.1, 1, 10, 100))
    below.set_yticklabels(["0.01", "0.1", "1", "10", "100"])
    below.set_autoscaley_on(False)
    for share, label, colour in (("share_changed", "changed", "C0"), ("share_opposed", "other sign", "C3")):
        values = [100 * getattr(sums, share) for sums in groups.values()]
        below.plot(places, values, "o", color=colour, markersize=4, label=label)
    below.set_xticks(places, list(groups), rotation=90)
    finish(figure, path)


def finish(figure: "Figure", path: Path) -> None:
    """Give all axes of a figure their looks, and write it as the PNG file `path`, whole or not at all.

    Raises:
        ResourceError: it cannot be written.
    """
    for axes in figure.axes:
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=130)
    atomic_write_bytes(path, buffer.getvalue())


def _dots(comparison: Comparison) -> list[tuple[float, float]]:
    """Every tensor that differs: its place, over the width of its block's bar in the order of the file; its %."""
    counts = Counter(comparison.group.values())
    seen: Counter[str] = Counter()
    dots: list[tuple[float, float]] = []
    for name, sums in comparison.tensors.items():
        group = comparison.group[name]
        seen[group] += 1
        if sums.relative:
            across = seen[group] / (counts[group] + 1) - 0.5
            dots.append((comparison.order.index(group) + 0.7 * across, 100 * sums.relative))
    return dots


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
