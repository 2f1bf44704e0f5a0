"""BOFT: outputs of layers are turned by butterflies (Liu et al. 2023, arXiv:2311.06243), in LyCORIS' form."""

from dataclasses import dataclass
from typing import ClassVar

from tuner.methods._rotation import Turning
from tuner.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class BOFT(Turning):
    """Learn several rotations one after another, each of blocks of outputs twice as far apart as in the one before.

    So outputs that are far apart are turned together with few numbers.
    """

    kind: ClassVar[str] = "boft"

    factors: int | None = None
    """How many rotations at most; where left out, as many as a layer's number of outputs allows: one, and one more for
    each time that its number of blocks can be halved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factors is not None and self.factors < 1:
            raise ValueError(f"factors must be at least 1, got {self.factors}")
        if any(size % 2 for size in (self.block_size, *self.block_sizes.values())):
            raise ValueError("block sizes must be even: the halves of blocks are exchanged")

    def divides(self, outputs: int, size: int) -> bool:
        return size % 2 == 0 and outputs % size == 0

    def shape(self, outputs: int, size: int) -> tuple[int, ...]:
        number = outputs // size
        possible = 1 + (number & -number).bit_length() - 1
        return (possible if self.factors is None else min(self.factors, possible), number, size, size)


SPEC: type[Method] = BOFT
