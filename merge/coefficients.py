"""A method's number: one for all tensors, or one by block or by pattern of names.

    t = 0.3
    t = { default = 0.3, blocks = { BASE = 0.0, IN04 = 0.8 }, names = [["*.attn2.*", 0.1]] }
    t = { preset = "GRAD_V" }

Methods declare such a field as `Number`, and read it by `fixed`: what they are given to merge with holds plain numbers,
those of the tensor at hand (`at`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Varying:
    """A number that depends on the tensor: the last pattern that fits its name, else its block's, else the default."""

    default: float | None = None
    """For tensors that nothing else names; without one, every tensor must be named."""
    preset: str | None = None
    """A named curve over the blocks, such as `GRAD_V`; `blocks` overrides it block by block."""
    blocks: Mapping[str, float] = field(default_factory=dict[str, float])
    names: tuple[tuple[str, float], ...] = ()
    """Patterns of tensor names with `*` and `?`, each with its number; the last that fits wins."""

    def at(self, name: str, block: str | None, preset: Mapping[str, float]) -> float | None:
        """The number for the tensor `name` in `block`; None when nothing says it. `preset` is the curve, by block."""
        for pattern, number in reversed(self.names):
            if fnmatchcase(name, pattern):
                return number
        if block is not None and block in self.blocks:
            return self.blocks[block]
        if block is not None and block in preset:
            return preset[block]
        return self.default


Number = float | Varying


def fixed(number: Number) -> float:
    """`number` in a method that has been resolved for one tensor."""
    assert not isinstance(number, Varying), "a method merges with the numbers of one tensor"
    return float(number)
