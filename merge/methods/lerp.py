"""Linear interpolation of two models: the `weighted sum` of most tools, and diffusers' `sigmoid` and `inv_sigmoid`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods.base import Elementwise, Space

Curve = Literal["linear", "smoothstep", "inverse_smoothstep"]


@dataclass(frozen=True, kw_only=True)
class Lerp(Elementwise):
    """a + s (b - a), where s is t, or what `curve` makes of t: `weighted sum` in AUTOMATIC1111, supermerger, sd-mecha.

    A share of 0 is a and of 1 is b, bit for bit; between equal inputs it is that input. Beware of ComfyUI's
    `ModelMergeSimple`, whose ratio is the share of the first model: t = 1 - ratio.

    Chattiori's `sigmoid` mode is none of these curves: at 0 it gives half of b, and no setting of it gives a.
    """

    t: Number = 0.5
    """The share of b. Any number for a linear curve, where one outside of [0, 1] extrapolates; else from 0 to 1."""
    curve: Curve = "linear"
    """`smoothstep`: s = t² (3 - 2t), which moves slowly near both ends (diffusers' `sigmoid`);
    `inverse_smoothstep`: its inverse, which moves slowly near the middle (diffusers' `inv_sigmoid`)."""

    takes = (Space.EITHER, Space.EITHER)
    gives = Space.EITHER
    temporaries = 0

    def __post_init__(self) -> None:
        if self.curve != "linear":
            check_range("t", self.t)

    @property
    def share(self) -> float:
        """The share of b: s."""
        t = fixed(self.t)
        if self.curve == "linear" or t in (0, 1):
            return t
        return t * t * (3 - 2 * t) if self.curve == "smoothstep" else 0.5 - math.sin(math.asin(1 - 2 * t) / 3)

    def unchanged(self) -> int | None:
        return {0.0: 0, 1.0: 1}.get(self.share)

    def spreads(self) -> bool:
        return self.unchanged() is None

    def merge(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        interpolate(inputs[0], inputs[1], self.share, out)


def interpolate(a: Tensor, b: Tensor, t: float, out: Tensor) -> None:
    """Write a + t (b - a), which is a where t = 0 and b where t = 1 whatever the other holds; `out` may be a or b."""
    if t in (0, 1):
        out.copy_(b if t else a)
    else:
        torch.lerp(a, b, t, out=out)


SPEC: type[Elementwise] = Lerp
