"""Shapes as one shape: a member that has members."""

from dataclasses import dataclass

from tests.tuner.config.shapes.base import AnyShape, Shape


@dataclass(frozen=True, kw_only=True)
class Group:
    parts: tuple[AnyShape, ...] = ()
    """The shapes in it."""
    first: AnyShape | None = None
    """Another, drawn before the others."""

    def area(self) -> float:
        return sum(part.area() for part in self.parts)


SPEC: type[Shape] = Group
