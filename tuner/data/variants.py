"""The variants of a picture: how each is cut and changed, and which of them a showing has."""

from dataclasses import dataclass
from math import sqrt

import torch
from PIL import Image
from torch import Tensor

from tuner.data.augment import Augment, Change
from tuner.data.buckets import Crop, centre_crop, crop_at
from tuner.data.example import Size
from tuner.data.images import Pictures, to_depth, to_pixels, to_weights
from tuner.rng import Position, generator_at

GOLDEN = (sqrt(5) - 1) / 2
"""Multiples of it lie evenly between whole numbers, however many they are."""


@dataclass(frozen=True)
class Variant:
    """A picture is changed, then cut."""

    crop: Crop
    """Of the changed picture."""
    change: Change | None

    def pixels(self, picture: Image.Image, flip: bool) -> Tensor:
        """An upright RGB picture as `to_pixels` gives it."""
        return to_pixels(picture if self.change is None else self.change.picture(picture), self.crop, flip)

    def depth(self, depth: Image.Image, flip: bool) -> Tensor:
        """A depth map as `to_depth` gives it, cut as the picture is."""
        return to_depth(depth if self.change is None else self.change.turn(depth), self.crop, flip)

    def weights(self, mask: Image.Image, flip: bool, size: Size) -> Tensor:
        """A mask as `to_weights` gives it, cut as the picture is."""
        return to_weights(mask if self.change is None else self.change.turn(mask), self.crop, flip, size)


def variant(pictures: Pictures, size: Size, bucket: Size, picture: str, number: int) -> Variant:
    """One variant of a picture of `size`, of which `picture` is the file's hash.

    It goes by what the picture holds, so that it stays the same, and encoded, whatever becomes of names, of other
    pictures, of the seed and of the number of variants. The cuts of a picture lie evenly over it.
    """
    change = None
    if pictures.augment != Augment():
        change = pictures.augment.draw(generator_at("augment", picture, number))
        size = change.size(size)
    if pictures.crop == "centre":
        return Variant(centre_crop(size, bucket), change)
    first = float(torch.rand((), generator=generator_at("crop", picture), dtype=torch.float64))
    return Variant(crop_at(size, bucket, (first + number * GOLDEN) % 1), change)


def number_at(pictures: Pictures, at: Position) -> int:
    """Which variant a showing has: over as many epochs as there are variants, each of them once."""
    if not pictures.varied:
        return 0
    round_, turn = divmod(at.epoch, pictures.variants)
    rng = generator_at(at.seed, "variant", round_, at.sample)
    return int(torch.randperm(pictures.variants, generator=rng)[turn])


def flip_at(pictures: Pictures, at: Position) -> bool:
    """Whether a showing is mirrored."""
    return pictures.flip and float(torch.rand((), generator=at.generator("flip"))) < 0.5
