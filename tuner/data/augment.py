"""Changes of a picture that leave what it shows: of its colours and of its angle."""

from dataclasses import dataclass
from functools import cached_property
from math import cos, radians, sin

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tuner.data.example import Size

LUMA = (0.213, 0.715, 0.072)
"""How much red, green and blue make up a colour's brightness (Filter Effects Module Level 1, W3C, as those of SVG)."""
GREY = 127.5
"""What contrast leaves where it is."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How far a picture's variants go from it, each drawn evenly up to there, either way; 0 is off."""

    brightness: float = 0.0
    """Of the brightness: 0.1 is from 0.9 to 1.1 times."""
    contrast: float = 0.0
    """Of the distance from grey."""
    saturation: float = 0.0
    """Of the distance from the colour's grey."""
    hue: float = 0.0
    """Degrees on the circle of colours."""
    rotation: float = 0.0
    """Degrees that a picture is turned; it is cut inside, so that no corner is empty."""

    def __post_init__(self) -> None:
        for name, most in {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 180, "rotation": 45}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in [0, {most}], got {getattr(self, name)}")

    def draw(self, rng: torch.Generator) -> "Change":
        """One variant's change."""
        brightness, contrast, saturation, hue, rotation = (2 * torch.rand(5, generator=rng).double() - 1).tolist()
        return Change(
            brightness=round(1 + brightness * self.brightness, 4),
            contrast=round(1 + contrast * self.contrast, 4),
            saturation=round(1 + saturation * self.saturation, 4),
            hue=round(hue * self.hue, 4),
            rotation=round(rotation * self.rotation, 4),
        )


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is done to one variant of a picture: factors and angles, named as in `Augment`."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    rotation: float = 0.0

    @cached_property
    def colours(self) -> NDArray[np.float64]:
        """Colours from 0 to 255 to the changed ones: `[3, 4]`, the last column is added.

        First hue and saturation, as the filter `feColorMatrix` of SVG has them, which leave greys as they are; then
        contrast and brightness. All are one matrix, so that values are rounded and clipped once.
        """
        grey = np.tile(LUMA, (3, 1))
        angle = radians(self.hue)
        across = np.array([[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]])
        hue = grey + cos(angle) * (np.eye(3) - grey) + sin(angle) * across
        saturation = grey + self.saturation * (np.eye(3) - grey)
        scale = self.brightness * self.contrast
        offset = self.brightness * (1 - self.contrast) * GREY
        return np.column_stack([scale * saturation @ hue, np.full(3, offset)])

    def size(self, size: Size) -> Size:
        """Of what is left of a picture of `size`: the largest box of its shape that lies in the turned picture."""
        angle, ratio = radians(abs(self.rotation)), max(size) / min(size)
        kept = 1 / (cos(angle) + ratio * sin(angle))
        return max(1, int(size[0] * kept)), max(1, int(size[1] * kept))

    def picture(self, picture: Image.Image) -> Image.Image:
        """An upright RGB picture, changed."""
        turned = self.turn(picture, Image.Resampling.BICUBIC)
        same = (self.brightness, self.contrast, self.saturation, self.hue) == (1, 1, 1, 0)
        return turned if same else turned.convert("RGB", tuple(self.colours.ravel()))

    def turn(self, picture: Image.Image, how: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
        """A picture, mask or depth map, turned only (to the left, about its middle), and cut to `size`."""
        if not self.rotation:
            return picture
        angle, size = -radians(self.rotation), self.size(picture.size)
        x, y, right, down = picture.width / 2, picture.height / 2, size[0] / 2, size[1] / 2
        across, along = cos(angle), sin(angle)
        matrix = (across, along, x - across * right - along * down, -along, across, y + along * right - across * down)
        return picture.transform(size, Image.Transform.AFFINE, matrix, how)
