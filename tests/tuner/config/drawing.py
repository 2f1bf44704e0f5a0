"""A config with a field of every kind."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.tuner.config.shapes.base import AnyShape
from tests.tuner.config.shapes.circle import Circle


@dataclass(frozen=True, kw_only=True)
class Ink:
    """What lines are drawn with."""

    colour: str = "black"
    """A colour's name.

    In English.
    """
    width: float = 0.5
    """In millimetres."""


@dataclass(frozen=True, kw_only=True)
class Page:
    margin: float = 10.0
    """In millimetres."""


@dataclass(frozen=True, kw_only=True)
class Config(Page):
    """A drawing."""

    output: Path
    """Where it goes."""
    shape: AnyShape
    """What is drawn."""
    learning_rate: float = 1e-4
    """How fast."""
    copies: int = 1
    """How many."""
    name: str = "drawing"
    """What it is called."""
    verbose: bool = False
    """Whether to tell."""
    seed: int | None = None
    """Where chance starts."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """How exact."""
    scale: float | Literal["auto"] = "auto"
    """How large."""
    size: tuple[int, int] = (210, 297)
    """Width and height."""
    words: tuple[str, ...] = ()
    """What is written on it."""
    ranks: dict[str, int] = field(default_factory=dict)
    """By pattern."""
    ink: Ink = field(default_factory=lambda: Ink(width=2.0))
    """The pen."""
    second_ink: Ink | None = None
    """Another pen."""
    inks: tuple[Ink, ...] = ()
    """More pens."""
    frame: AnyShape = Circle(radius=3.0)  # noqa: RUF009
    """What is around it."""
    shapes: tuple[AnyShape, ...] = ()
    """What else is drawn."""
