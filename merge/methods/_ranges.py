"""The ranges of numbers: a method refuses what its formula has no meaning for when it is made."""

import math

from merge.coefficients import Number, Varying


def refuse_outside(name: str, number: Number, least: float = -math.inf, most: float = math.inf) -> None:
    """Refuse a `number`, the field `name`, that is or may become less than `least` or more than `most`.

    Raises:
        ValueError: naming the field and the number.
    """
    for value in _values(number):
        if not least <= value <= most:
            wanted = f"{least:g} or more" if math.isinf(most) else f"between {least:g} and {most:g}"
            raise ValueError(f"{name}: must be {wanted}, got {value}")


def _values(number: Number) -> list[float]:
    """All that a number may be."""
    if not isinstance(number, Varying):
        return [number]
    values = [*number.curve.values(), *number.blocks.values(), *(value for _, value in number.names)]
    return values if number.default is None else [number.default, *values]
