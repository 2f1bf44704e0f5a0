"""Smooth add: a difference is rid of its outliers and blurred before it is added."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from merge.coefficients import Number, fixed
from merge.methods._numbers import check_range
from merge.methods.add import add
from merge.methods.base import Extent, MergeMethod, Space, Whole

SLAB = 1 << 22
"""Neighbours that are looked at together."""
REACH = 4
"""Where the Gaussian ends, in sigmas: scipy's choice."""


@dataclass(frozen=True, kw_only=True)
class SmoothAdd(Whole):
    """a + weight * gauss(median(d)): with d = b - c, supermerger's `smoothAdd`.

    supermerger filters along every axis. But the channels of a layer stand in no order, so that the mean of a channel
    and its neighbour is one of two strangers: reorder the channels of a network, which changes nothing that it does,
    and `axes = "all"` gives another model. Here only the places of a convolution's kernel are neighbours, and tensors
    that have no such axes get their difference as it is.

    Beyond an edge numbers are mirrored, the outermost repeated (scipy's `reflect`). A weight of 0 is a, bit for bit.
    """

    weight: Number = 1.0
    """How much of the smoothed difference; any number."""
    median: int = 3
    """The width of the median filter, an odd number; 1 leaves the difference as it is."""
    sigma: Number = 1.0
    """The width of the Gaussian, 0 or more; 0 leaves the difference as it is."""
    axes: Literal["spatial", "all"] = "spatial"
    """Along which axes: `spatial`, those of a convolution's kernel; `all`, supermerger's choice (slow: each number is
    the median of 81 in a convolution)."""

    takes = (Space.WEIGHT, Space.DELTA)
    gives = Space.WEIGHT

    def __post_init__(self) -> None:
        if self.median < 1 or self.median % 2 == 0:
            raise ValueError(f"median must be an odd number, 1 or more, got {self.median}")
        check_range("sigma", self.sigma, high=math.inf)

    def unchanged(self) -> int | None:
        return 0 if fixed(self.weight) == 0 else None

    def computing(self, of: Extent) -> float:
        sides = [side for side in of.shape[2 if self.axes == "spatial" else 0 :] if side > 1]
        if not sides:
            return of.size * of.elements
        reach = int(REACH * fixed(self.sigma) + 0.5)
        padded = math.prod((side + self.median - 1) / side for side in sides)
        width = self.median ** len(sides)
        windows = min(SLAB, of.elements * width)
        before = of.elements - windows / width  # numbers whose medians are known when the last windows are looked at
        copied = of.size if len(sides) > 1 else 0
        filtering = (padded * of.elements + before) * of.size + windows * (copied + (of.size + 8) / width)
        # what is blurred, with a margin, and what comes of it
        blurring = (2 + max((side + 2 * reach) / side for side in sides)) * of.size * of.elements
        return max(filtering, blurring)

    def compute(self, tensors: Sequence[Tensor]) -> Tensor:
        a, difference = tensors
        first = 2 if self.axes == "spatial" else 0
        axes = [axis for axis in range(first, a.ndim) if a.shape[axis] > 1]
        smooth = blurred(median_filtered(difference, self.median, axes), fixed(self.sigma), axes)
        out = torch.empty_like(a)
        add(a, smooth, fixed(self.weight), out)
        return out


def median_filtered(tensor: Tensor, width: int, axes: Sequence[int]) -> Tensor:
    """Each number replaced by the median of its neighbourhood, `width` wide along each of `axes`."""
    if width == 1 or not axes:
        return tensor
    padded = tensor
    for axis in axes:
        padded = _padded(padded, axis, width // 2)
    windows = padded
    for axis in axes:
        windows = windows.unfold(axis, width, 1)
    result = torch.empty_like(tensor)
    rows = max(1, SLAB * tensor.shape[0] // (tensor.numel() * width ** len(axes)))
    for part, into in zip(windows.split(rows), result.split(rows), strict=True):
        into.copy_(part.flatten(tensor.ndim).median(-1).values)
    return result


def blurred(tensor: Tensor, sigma: float, axes: Sequence[int]) -> Tensor:
    """`tensor` convolved with a Gaussian of width `sigma` along each of `axes`."""
    reach = int(REACH * sigma + 0.5)
    if reach == 0:
        return tensor
    bell = [math.exp(-0.5 * (place / sigma) ** 2) for place in range(-reach, reach + 1)]
    for axis in axes:
        tensor = _blurred_along(tensor, axis, bell)
    return tensor


def _blurred_along(tensor: Tensor, axis: int, bell: Sequence[float]) -> Tensor:
    padded, result = _padded(tensor, axis, len(bell) // 2), torch.zeros_like(tensor)
    for place, height in enumerate(bell):
        result.add_(padded.narrow(axis, place, tensor.shape[axis]), alpha=height / math.fsum(bell))
    return result


def _padded(tensor: Tensor, axis: int, by: int) -> Tensor:
    """`tensor` with `by` more numbers before and after along `axis`: d c b a | a b c d | d c b a, over and over."""
    length = tensor.shape[axis]
    places = torch.arange(-by, length + by, device=tensor.device) % (2 * length)
    return tensor.index_select(axis, torch.minimum(places, 2 * length - 1 - places))


SPEC: type[MergeMethod] = SmoothAdd
