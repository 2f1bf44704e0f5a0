"""One picture of a data set, before any pixel of it is read."""

from dataclasses import dataclass
from pathlib import Path

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Where a picture is, what it shows, and how much it counts."""

    image: Path
    size: Size
    """Upright: after the turn that EXIF asks for."""
    caption: str
    mask: Path | None = None
    """A picture of the same size: where it is white the loss counts, where it is black it does not."""
    guide: Path | None = None
    """A picture of the same size that the model is told of it: the mask of what is to be painted (white), a depth map,
    or the picture that was edited; for models that are told one."""
    weight: float = 1.0
    """Its loss is multiplied by this: the prior weight for a class picture of DreamBooth."""
    repeats: int = 1
    """How many times an epoch shows it."""
    prior: bool = False
    """Whether its target is what the untrained model predicts of it, and not what was added to it."""
    area: int | None = None
    """The resolution that it is shown at; None where that goes by its size."""
    source: str = "data"
    """Which part of the data it is of, for reports: `data`, `subject`; a picture of `class` is never held out."""
