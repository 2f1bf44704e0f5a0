"""OFT: outputs of layers are turned (Qiu et al. 2023, arXiv:2306.07280), in the form that LyCORIS calls `diag-oft`."""

from dataclasses import dataclass
from typing import ClassVar

from tuner.methods._rotation import Turning
from tuner.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class OFT(Turning):
    """Learn a rotation of each block of `block_size` outputs of a layer; it keeps the angles between neurons."""

    kind: ClassVar[str] = "oft"

    def divides(self, outputs: int, size: int) -> bool:
        return outputs % size == 0 and size <= outputs // size  # LyCORIS reads no blocks larger than their number


SPEC: type[Method] = OFT
