"""What methods say of their numbers: ranges, one weight for each input, parts of a number of things."""

from collections.abc import Sequence
from math import inf

from merge.coefficients import Number, Varying, fixed
from tuner.errors import ConfigError

SLACK = 1e-6
"""Of a thing: what a part may lack of a whole number of things because it is a binary fraction."""


def check_range(field: str, number: Number, low: float = 0, high: float = 1) -> None:
    """Refuse a number that is, or for some tensor may be, less than `low` or more than `high`.

    Raises:
        ValueError: naming `field`.
    """
    values = [number]
    if isinstance(number, Varying):
        values = [*number.blocks.values(), *(value for _, value in number.names), *number.curve.values()]
        values += [] if number.default is None else [number.default]
    for value in values:
        if not low <= fixed(value) <= high:
            wanted = f"{low:g} or more" if high == inf else f"from {low:g} to {high:g}"
            raise ValueError(f"{field} must be {wanted}, got {value}")


def one_each(weights: Sequence[Number], inputs: int) -> list[float]:
    """The weights of the inputs; 1 for each when there are none.

    Raises:
        ConfigError: more or fewer than there are inputs.
    """
    if weights and len(weights) != inputs:
        raise ConfigError(f"weights: {len(weights)} of them for {inputs} inputs; give one for each, or none")
    return [fixed(weight) for weight in weights] or [1.0] * inputs


def part(share: float, count: int) -> int:
    """How many are `share` of `count` things, rounded down: 29 are 0.29 of 100, though 0.29 * 100 is a little less."""
    return int(share * count + SLACK)


def window(width: float, offset: float, count: int) -> list[tuple[int, int]]:
    """Which of `count` things lie from `offset` to `offset + width`, in parts of them, as ranges of their indices.

    What goes beyond the end begins again at 0.
    """
    begin, end = part(offset, count), part(offset + width, count)
    if begin >= count:
        begin, end = begin - count, end - count
    return [(begin, end)] if end <= count else [(begin, count), (0, end - count)]
