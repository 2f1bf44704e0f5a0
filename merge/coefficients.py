"""A method's number: one for all tensors, or one by block or by pattern of names.

    t = 0.3
    t = { default = 0.3, blocks = { BASE = 0.0, IN04 = 0.8 }, names = [["*.attn2.*", 0.1]] }
    t = { preset = "GRAD_V" }
    t = { preset = "GRAD_V", blend = "COSINE", share = 0.3 }

Methods declare such a field as `Number`, and read it by `fixed`: what they are given to merge with holds plain numbers,
those of the tensor at hand (`resolve`). Blocks are those of `merge.blocks`, presets those of `merge.presets`.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, TypeVar, cast

from merge.blocks import BASE, VAE, Blocks
from merge.methods.base import MergeMethod
from merge.presets import curve
from tuner.errors import ConfigError, did_you_mean

M = TypeVar("M", bound=MergeMethod)


@dataclass(frozen=True, kw_only=True)
class Varying:
    """A number that depends on the tensor: the last pattern that fits its name, else its block's, else the default.

    A block's number is the one in `blocks`, else the preset's. A VAE that has neither takes those of BASE.
    """

    default: float | None = None
    """For tensors that nothing else names; without one, every tensor must be named."""
    preset: str | None = None
    """A named curve over the blocks, such as `GRAD_V`; `blocks` overrides it block by block."""
    blend: str | None = None
    """A second preset, mixed into the first."""
    share: float | None = None
    """How much of the second there is in the mix, from 0 to 1; half when left out."""
    blocks: Mapping[str, float] = field(default_factory=dict[str, float])
    """The number of each block, such as `{ IN04 = 0.8 }`."""
    names: tuple[tuple[str, float], ...] = ()
    """Patterns of tensor names with `*` and `?`, each with its number; the last that fits wins."""

    def __post_init__(self) -> None:
        if self.preset is None and self.blend is not None:
            raise ValueError("blend: there is nothing to blend with; give a preset too")
        if self.blend is None and self.share is not None:
            raise ValueError("share: there is nothing to share with; give a blend too")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"share: must be between 0 and 1, got {self.share}")
        if self.default is None and self.preset is None and not self.blocks and not self.names:
            raise ValueError("says nothing; give a default, a preset, blocks or names")
        for which, preset in (("preset", self.preset), ("blend", self.blend)):
            try:
                _ = preset and curve(preset)
            except ValueError as error:
                raise ValueError(f"{which}: {error}") from None

    @cached_property
    def curve(self) -> Mapping[str, float]:
        """What the presets say, by block; empty without one."""
        if self.preset is None:
            return {}
        first = curve(self.preset)
        if self.blend is None:
            return first
        second, share = curve(self.blend), 0.5 if self.share is None else self.share
        return {block: (1 - share) * number + share * second[block] for block, number in first.items()}

    def at(self, name: str, block: str | None) -> float | None:
        """The number for the tensor `name` in `block`; None when nothing says it."""
        for pattern, number in reversed(self.names):
            if fnmatchcase(name, pattern):
                return number
        for label in () if block is None else (VAE, BASE) if block == VAE else (block,):
            if label in self.blocks:
                return self.blocks[label]
            if label in self.curve:
                return self.curve[label]
        return self.default


Number = float | Varying


def fixed(number: Number) -> float:
    """`number` in a method that has been resolved for one tensor."""
    assert not isinstance(number, Varying), "a method merges with the numbers of one tensor"
    return float(number)


def resolve(method: M, name: str, blocks: Blocks) -> M:
    """`method` with plain numbers, those for the tensor `name`; `method` itself where nothing varies.

    Raises:
        ConfigError: a number that nothing says.
    """
    found: dict[str, Any] = {}
    block: str | None = None
    for key, value in _varying_fields(method).items():
        block = block or blocks.block(name)
        if isinstance(value, Varying):
            found[key] = _number(value, name, block, key)
        else:
            found[key] = tuple(
                _number(item, name, block, f"{key}.{index}") if isinstance(item, Varying) else item
                for index, item in enumerate(value)
            )
    try:
        return cast(M, replace(cast(Any, method), **found)) if found else method
    except ValueError as error:  # what a method refuses of its numbers
        raise ConfigError(f"{type(method).__name__}: for {name!r}: {error}") from error


def check(method: MergeMethod, names: Collection[str], blocks: Blocks, path: str = "") -> None:
    """Refuse numbers of `method` that do not fit a network.

    Args:
        names: the tensors that are merged.
        blocks: their blocks.
        path: where the method is in its config, for the messages.

    Raises:
        ConfigError: unknown blocks, patterns that fit no tensor, tensors that nothing gives a number; all of them, one
            per line, each with its path.
    """
    problems: list[str] = []
    for key, value in _varying_fields(method).items():
        items = {key: value} if isinstance(value, Varying) else {f"{key}.{i}": item for i, item in enumerate(value)}
        for where, item in items.items():
            if isinstance(item, Varying):
                place = f"{path}.{where}" if path else where
                problems += (f"{place}{problem}" for problem in _problems(item, names, blocks))
    if problems:
        raise ConfigError("\n".join(problems))


def _varying_fields(method: MergeMethod) -> dict[str, Varying | tuple[object, ...]]:
    """The fields of `method` that are numbers which vary, or tuples with such in them."""
    found: dict[str, Varying | tuple[object, ...]] = {}
    for entry in fields(cast(Any, method)):
        value: object = getattr(method, entry.name)
        if isinstance(value, Varying):
            found[entry.name] = value
        elif isinstance(value, tuple):
            items = cast("tuple[object, ...]", value)
            if any(isinstance(item, Varying) for item in items):
                found[entry.name] = items
    return found


def _number(varying: Varying, name: str, block: str | None, key: str) -> float:
    number = varying.at(name, block)
    if number is None:
        raise ConfigError(f"{key}: no number for {name!r}; give a default")
    return number


def _problems(varying: Varying, names: Collection[str], blocks: Blocks) -> Iterator[str]:
    """What of `varying` does not fit the tensors `names`; each begins with the field, or with a colon."""
    known = list(blocks.names)
    for label in varying.blocks:
        if label not in known and not known:
            yield f".blocks.{label}: the blocks of these tensors are not known; give patterns in names"
        elif label not in known:
            meant = did_you_mean(label.upper(), known)
            yield f".blocks.{label}: no such block{meant} (there are: {', '.join(known)})"
    if varying.preset is not None and blocks.kind != "unet":
        what = "a transformer" if blocks.kind else "a network whose blocks are not known"
        yield f".preset: {varying.preset!r} is a curve over a UNet's blocks, and this is {what}; give blocks or names"
    for index, (pattern, _) in enumerate(varying.names):
        if not any(fnmatchcase(name, pattern) for name in names):
            example = next(iter(names), "")
            yield f".names.{index}: {pattern!r} fits none of {len(names)} tensors, such as {example!r}"
    without = [name for name in names if varying.at(name, blocks.block(name)) is None]
    if without:
        where = ", ".join(sorted({blocks.block(name) or "no block" for name in without}))
        count = f"{len(without)} of {len(names)} tensors"
        yield f": no number for {count}, such as {without[0]!r} (in {where}); give a default"
