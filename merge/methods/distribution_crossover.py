"""Low frequencies of a and high ones of b, along the tensor's numbers in the order of a third (of sd-meh)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods.base import Extent, MergeMethod, Space, Whole


@dataclass(frozen=True, kw_only=True)
class DistributionCrossover(Whole):
    """a + F^-1[h F(b - a)], F being the Fourier transform along the numbers sorted by c, the smallest c first.

    h is 0 at frequencies below alpha and 1 above: h(f) = clamp((f - alpha) / beta + 1/2, 0, 1), with f from 0 to 1
    (each number's neighbour its opposite). Sorted so, neighbours are of like size in c; a low frequency is what a or
    b does to the distribution of sizes, a high one what it does to single numbers.

    This is (1 - h) F(a) + h F(b) transformed back, but keeps equal inputs as they are. A tensor of one number, which
    has no frequency but 0, is alpha a + (1 - alpha) b. Numbers that are equal in c stay in their order.
    """

    alpha: Number = 0.5
    """In [0, 1]: where b begins."""
    beta: Number = 0.0
    """0 or more: the width of the change from a to b; 0: at once."""

    takes = (Space.EITHER, Space.EITHER, Space.EITHER)
    gives = Space.EITHER

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha)
        check_range("beta", self.beta, high=inf)

    def unchanged(self) -> int | None:
        return {0.0: 1, 1.0: 0}.get(fixed(self.alpha)) if fixed(self.beta) == 0 else None

    def computing(self, of: Extent) -> float:
        return (8 + 7 * of.size) * of.elements

    def compute(self, tensors: Sequence[Tensor]) -> Tensor:
        a, b, c = (tensor.reshape(-1) for tensor in tensors)
        alpha, beta = fixed(self.alpha), fixed(self.beta)
        if a.numel() <= 1:
            return torch.lerp(b, a, alpha).reshape(tensors[0].shape)
        order = torch.argsort(c, stable=True)
        waves = torch.fft.rfft((b - a)[order])
        f = torch.arange(waves.numel(), dtype=a.dtype, device=a.device) / waves.numel()
        waves *= ((f - alpha) / beta + 0.5).clamp(0, 1) if beta > 0 else f >= alpha
        change = torch.empty_like(a)
        change[order] = torch.fft.irfft(waves, a.numel())
        return (a + change).reshape(tensors[0].shape)


SPEC: type[MergeMethod] = DistributionCrossover
