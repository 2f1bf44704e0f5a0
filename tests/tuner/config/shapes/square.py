"""A square."""

from dataclasses import dataclass

from tests.tuner.config.shapes.base import Shape


@dataclass(frozen=True, kw_only=True)
class Square:
    side: int
    """How long one side is."""

    def area(self) -> float:
        return float(self.side**2)


SPEC: type[Shape] = Square
