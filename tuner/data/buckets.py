"""Aspect-ratio buckets: sizes of about the same area that pictures are scaled and cropped to.

After NovelAI's aspect ratio bucketing (2022); the nearest bucket is taken by the ratio of ratios, so that portrait and
landscape are treated alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log

from tuner.data.example import Example, Size


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Every size of about `resolution` squared pixels whose sides are multiples of `step`."""

    resolution: int
    """The side of the square bucket, in pixels."""
    step: int
    """Sides are multiples of this, in pixels; at least the model's own step."""
    max_ratio: float = 2.0
    """The longer side is at most this many times the shorter."""
    smaller: "Buckets | None" = None
    """Those of the next smaller area, for pictures that would have to be enlarged to these."""

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

    @cached_property
    def areas(self) -> dict[int, "Buckets"]:
        """Each area's own buckets by its resolution, the largest first."""
        return {self.resolution: replace(self, smaller=None), **({} if self.smaller is None else self.smaller.areas)}

    def nearest(self, size: Size) -> Size:
        """The bucket whose aspect ratio is closest to that of `size`.

        Of several areas it is of the largest that `size` fills without being enlarged, and of the smallest where it
        fills none.
        """
        width, height = size
        found = min(self.sizes, key=lambda bucket: abs(log(bucket[0] / bucket[1] * height / width)))
        if self.smaller is not None and (found[0] > width or found[1] > height):
            return self.smaller.nearest(size)
        return found

    def of(self, example: Example) -> Size:
        """The bucket of an example: of its own area where it has one."""
        return (self if example.area is None else self.areas[example.area]).nearest(example.size)


def in_each_area(examples: Sequence[Example], buckets: Buckets) -> list[Example]:
    """Each example once for each area, so that an epoch shows it in all of them."""
    return [replace(example, area=area) for area in buckets.areas for example in examples]


def default_step(resolution: int, multiple: int) -> int:
    """The coarsest step for `resolution`: a multiple of `multiple`, at most an eighth of it and at most 64 pixels."""
    steps = range(multiple, max(multiple, min(64, resolution // 8)) + 1, multiple)
    return max((step for step in steps if resolution % step == 0), default=multiple)


@dataclass(frozen=True)
class Crop:
    """How a picture becomes its bucket's size: scaled until it covers it, then cut at whole pixels.

    Both are done in one step, from `box` of the picture to the bucket.
    """

    source: Size
    """Of the upright picture."""
    bucket: Size
    left: int
    """Where the cut begins, in pixels of the scaled picture."""
    top: int
    """As `left`, from above."""

    @property
    def scale(self) -> float:
        """The scaled picture's side over the picture's own."""
        return max(self.bucket[0] / self.source[0], self.bucket[1] / self.source[1])

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what is seen of the picture, in its pixels."""
        (width, height), (left, top) = self.source, (self.left / self.scale, self.top / self.scale)
        right, bottom = left + self.bucket[0] / self.scale, top + self.bucket[1] / self.scale
        return left, top, min(right, width), min(bottom, height)  # rounding can go beyond

    def frame(self, flip: bool = False) -> tuple[int, int, int, int, int, int]:
        """Height and width of the picture, top and left of the cut in the scaled picture, height and width of the cut.

        What Stable Diffusion XL is told (Podell et al. 2023, arXiv:2307.01952); of a mirrored picture, as its mirror
        image was cut.
        """
        left = room(self.source, self.bucket)[0] - self.left if flip else self.left
        return self.source[1], self.source[0], self.top, left, self.bucket[1], self.bucket[0]


def room(source: Size, bucket: Size) -> tuple[int, int]:
    """How far the cut can be moved to the right and down, in whole pixels of the scaled picture."""
    scale = max(bucket[0] / source[0], bucket[1] / source[1])
    return int(source[0] * scale + 1e-6) - bucket[0], int(source[1] * scale + 1e-6) - bucket[1]


def crop_at(size: Size, bucket: Size, place: float) -> Crop:
    """As `centre_crop`, but with `place` in [0, 1) from the left, or from above, to the right or to below."""
    right, down = room(size, bucket)
    return Crop(size, bucket, int((right + 1) * place), int((down + 1) * place))


def centre_crop(size: Size, bucket: Size) -> Crop:
    """The largest box of the bucket's shape in the middle of a picture of `size`."""
    right, down = room(size, bucket)
    return Crop(size, bucket, right // 2, down // 2)
