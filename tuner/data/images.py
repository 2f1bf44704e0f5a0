"""Pictures, from files to pixels."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from tuner.data.buckets import Crop
from tuner.data.example import Size
from tuner.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: a small file can claim any size."""
ORIENTATION = 0x0112
"""EXIF's tag of how a picture is to be turned; 5 to 8 swap its sides."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How pictures become what the model sees."""

    resolution: int | None = None
    """The side of the square bucket, in pixels; others have about its area. The base's own where left out."""
    bucket_step: int | None = None
    """Bucket sides are multiples of this, in pixels; where left out, an eighth of the resolution, at most 64."""
    max_ratio: float = 2.0
    """Buckets' longer side is at most this many times the shorter; pictures beyond are cropped to it."""
    flip: bool = False
    """Whether half of the showings, by chance, are mirrored left to right."""
    background: str = "white"
    """The colour put behind transparent pictures: a name, or #rrggbb."""
    latents: str = "sample"
    """`sample` draws from the autoencoder's distribution at each showing, `mean` takes its middle."""

    def __post_init__(self) -> None:
        if self.latents not in ("sample", "mean"):
            raise ValueError(f"latents must be 'sample' or 'mean', got {self.latents!r}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(f"background must be a colour's name or #rrggbb, got {self.background!r}") from None


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """The picture in `file`, its header read; whatever is wrong with it becomes one line.

    Raises:
        DataError: unreadable, damaged, animated, or larger than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is checked here
            with Image.open(file) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise DataError(f"{file}: {picture.width} x {picture.height} pixels are too many; scale it down")
                if getattr(picture, "n_frames", 1) > 1:
                    raise DataError(f"{file}: has {picture.n_frames} frames; save the one you mean")  # pyright: ignore[reportAttributeAccessIssue]
                yield picture
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(file), "it").strip().splitlines()[0]
        raise DataError(f"{file}: not a readable picture ({reason}); replace or remove it") from error


def upright_size(file: Path) -> Size:
    """Width and height after the turn that EXIF asks for; only the header is read.

    Raises:
        DataError: as for `load_picture`.
    """
    with _opened(file) as picture:
        width, height = picture.size
        return (height, width) if picture.getexif().get(ORIENTATION, 1) >= 5 else (width, height)


def load_picture(file: Path, background: str) -> Image.Image:
    """The picture upright, in RGB, on `background` where it is transparent.

    Raises:
        DataError: unreadable, damaged, animated, too large, or in floating point.
    """
    with _opened(file) as picture:
        return _rgb(ImageOps.exif_transpose(picture), background, file)


def _rgb(picture: Image.Image, background: str, file: Path) -> Image.Image:
    if picture.mode == "F":
        raise DataError(f"{file}: holds floating-point values of unknown range; save it with 8 or 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion clips it to white
        values = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray((values * 255 // 65535).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        canvas = Image.new("RGBA", picture.size, background)
        picture = Image.alpha_composite(canvas, picture.convert("RGBA"))
    return picture.convert("RGB")


def to_pixels(picture: Image.Image, crop: Crop, flip: bool) -> Tensor:
    """`crop` of an upright RGB picture, scaled (Lanczos): `[3, H, W]` float32 in [-1, 1]."""
    scaled = picture.resize(crop.size, Image.Resampling.LANCZOS, box=crop.box, reducing_gap=None)
    if flip:
        scaled = ImageOps.mirror(scaled)
    values = torch.from_numpy(np.array(scaled))
    return values.permute(2, 0, 1).float() / 127.5 - 1
