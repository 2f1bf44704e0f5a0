"""What a shape does."""

from typing import Annotated, Protocol

from tuner.plugins import Folder


class Shape(Protocol):
    def area(self) -> float: ...


AnyShape = Annotated[Shape, Folder("tests.tuner.config.shapes")]
