"""Aspect-ratio buckets: sizes of about the same area that pictures are scaled and cropped to.

After NovelAI's aspect ratio bucketing (2022); the nearest bucket is taken by the ratio of ratios, so that portrait and
landscape are treated alike.
"""

from dataclasses import dataclass
from functools import cached_property
from math import log

from tuner.data.example import Size


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Every size of about `resolution` squared pixels whose sides are multiples of `step`."""

    resolution: int
    """The side of the square bucket, in pixels."""
    step: int
    """Sides are multiples of this, in pixels; at least the model's own step."""
    max_ratio: float = 2.0
    """The longer side is at most this many times the shorter."""

    def __post_init__(self) -> None:
        if self.resolution < self.step or self.resolution % self.step:
            raise ValueError(f"resolution must be a multiple of {self.step}, got {self.resolution}")
        if self.max_ratio < 1:
            raise ValueError(f"max_ratio must be at least 1, got {self.max_ratio}")

    @cached_property
    def sizes(self) -> list[Size]:
        """The bucket sizes, narrowest first, the square among them; for each its mirror too."""
        area, wide = self.resolution**2, {(self.resolution, self.resolution)}
        for width in range(self.resolution, int(self.resolution * self.max_ratio) + 1, self.step):
            height = area // width // self.step * self.step
            if height and width / height <= self.max_ratio:
                wide.add((width, height))
        return sorted(wide | {(height, width) for width, height in wide}, key=lambda size: (size[0] / size[1], size))

    def nearest(self, size: Size) -> Size:
        """The bucket whose aspect ratio is closest to that of `size`."""
        width, height = size
        return min(self.sizes, key=lambda bucket: abs(log(bucket[0] / bucket[1] * height / width)))


def default_step(resolution: int, multiple: int) -> int:
    """The coarsest step for `resolution`: a multiple of `multiple`, at most an eighth of it and at most 64 pixels."""
    steps = range(multiple, max(multiple, min(64, resolution // 8)) + 1, multiple)
    return max((step for step in steps if resolution % step == 0), default=multiple)


@dataclass(frozen=True)
class Crop:
    """How a picture becomes its bucket's size: the box of the source, in its pixels, that is scaled to `size`."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom."""
    size: Size


def centre_crop(size: Size, bucket: Size) -> Crop:
    """The largest box of the bucket's shape in the middle of a picture of `size`."""
    scale = min(size[0] / bucket[0], size[1] / bucket[1])
    width, height = bucket[0] * scale, bucket[1] * scale
    left, top = max(0.0, (size[0] - width) / 2), max(0.0, (size[1] - height) / 2)  # rounding can go below
    return Crop((left, top, min(left + width, size[0]), min(top + height, size[1])), bucket)
