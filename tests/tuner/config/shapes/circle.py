"""A circle."""

import math
from dataclasses import dataclass

from tests.tuner.config.shapes.base import Shape


@dataclass(frozen=True, kw_only=True)
class Circle:
    """All points at one distance."""

    radius: float = 1.0
    """The distance."""

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise ValueError(f"radius must be positive, got {self.radius}")

    def area(self) -> float:
        return math.pi * self.radius**2


SPEC: type[Shape] = Circle
