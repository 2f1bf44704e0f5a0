"""Pictures, from files to pixels."""

import errno
import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps
from torch import Tensor

from tuner.data.augment import Augment
from tuner.data.buckets import Crop
from tuner.data.example import Size
from tuner.data.guides import Guides
from tuner.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
OTHER_SUFFIXES = {".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg"}
"""Pictures, too, but not to be read here: said, so that none is left out unnoticed."""
MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: a small file can claim any size."""
ORIENTATION = 0x0112
"""EXIF's tag of how a picture is to be turned; 5 to 8 swap its sides."""
TROUBLE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT)
"""Errors of the machine while a file is read, which say nothing about the file."""
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
COLOURS = {"L": "GRAY", "CMYK": "CMYK"}
"""The kind of colour profile that belongs to a picture's mode; to all others belongs one for RGB."""


class BrokenPicture(DataError):
    """A picture that cannot be decoded: damaged, cut off, no picture at all, or one that may not be read.

    Another `DataError` is what is wrong with a picture that could be: several frames, too many pixels, values of
    unknown range. Only broken pictures may be left out; what to make of the others is for a person to say.
    """

    def __init__(self, file: Path, message: str) -> None:
        super().__init__(message)
        self.file = file


E = TypeVar("E", bound=Exception)


def noted(error: E) -> E:
    """An error to be kept, without the places that it came through, which hold half a picture or what reads others."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How pictures become what the model sees."""

    resolution: int | tuple[int, ...] | None = None
    """The side of the square bucket, in pixels; others have about its area. Several, such as [512, 768], are several
    areas. The base's own where left out."""
    areas: Literal["fitting", "each"] = "fitting"
    """Of several resolutions a picture is shown at: `fitting`, the largest that it fills without being enlarged, or the
    smallest where it fills none; or `each`, once at every one, so that an epoch is as many times longer."""
    bucket_step: int | None = None
    """Bucket sides are multiples of this, in pixels; where left out, about an eighth of the resolution, at most 64."""
    max_ratio: float = 2.0
    """Buckets' longer side is at most this many times the shorter; pictures beyond are cropped to it."""
    crop: Literal["centre", "random"] = "centre"
    """Where pictures are cut that are not of their bucket's shape: in the middle, or anywhere, each variant elsewhere.
    """
    augment: Augment = field(default_factory=Augment)
    """How colours and angle of pictures vary."""
    variants: int = 4
    """With random cuts or `augment`: how many variants of each picture there are. So many are encoded, and each is
    shown once in as many epochs, in an order by chance."""
    flip: bool = False
    """Whether half of the showings, by chance, are mirrored left to right."""
    background: str = "white"
    """The colour put behind transparent pictures: a name, or #rrggbb."""
    alpha: str = "background"
    """What transparency means: `background` puts the colour behind it; `mask` does, too, and the loss counts there as
    much as the picture is opaque. A source's own masks come first."""
    broken: Literal["refuse", "skip"] = "refuse"
    """What to do about training pictures that cannot be decoded: `refuse` ends the run before it begins, and names them
    all; `skip` leaves them out as if they were not there, and lists them in `left-out.txt` of the run's folder. Nothing
    takes their place. Everything else that is wrong with the data is refused in any case."""
    latents: str = "sample"
    """`sample` draws from the autoencoder's distribution at each showing, `mean` takes its middle."""
    guides: Guides = field(default_factory=Guides)
    """What a model for inpainting or editing is told of them."""

    def __post_init__(self) -> None:
        if self.bucket_step is not None and self.bucket_step < 1:
            raise ValueError(f"bucket_step must be positive, got {self.bucket_step}")
        if self.resolution is not None and (not self.resolutions or min(self.resolutions) < 1):
            raise ValueError(f"resolution must be positive, got {self.resolution}")
        if len(set(self.resolutions)) < len(self.resolutions):
            raise ValueError(f"resolution names one twice: {list(self.resolutions)}")
        if self.areas != "fitting" and len(self.resolutions) < 2:
            raise ValueError("areas has no effect with one resolution; give several, such as [512, 768]")
        if self.variants < 2:
            raise ValueError(f"variants must be at least 2, got {self.variants}; for one, leave crop and augment out")
        if not self.varied and self.variants != 4:
            raise ValueError("variants has no effect without crop = 'random' or augment; leave it out")
        if self.max_ratio < 1:
            raise ValueError(f"max_ratio must be at least 1, got {self.max_ratio}")
        if self.alpha not in ("background", "mask"):
            raise ValueError(f"alpha must be 'background' or 'mask', got {self.alpha!r}")
        if self.latents not in ("sample", "mean"):
            raise ValueError(f"latents must be 'sample' or 'mean', got {self.latents!r}")
        try:
            opaque = len(ImageColor.getrgb(self.background)) == 3
        except ValueError:
            opaque = False
        if not opaque:
            raise ValueError(f"background must be a colour's name or #rrggbb, got {self.background!r}")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """What `resolution` names; nothing where it is the base's own."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,) if self.resolution else ()

    @property
    def varied(self) -> bool:
        """Whether there are variants of pictures."""
        return self.crop == "random" or self.augment != Augment()

    @property
    def plain(self) -> "Pictures":
        """The same with nothing left to chance, as for validation."""
        return replace(self, flip=False, crop="centre", augment=Augment(), variants=4)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """The picture in `file`, its header read; whatever is wrong with it becomes one line.

    Raises:
        BrokenPicture: unreadable, damaged, or no file.
        DataError: animated, larger than `MAX_PIXELS`, or the machine is at fault.
    """
    try:
        if not file.is_file():
            raise BrokenPicture(file, f"{file}: is no file; remove it, or give it another name")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is checked here
            with Image.open(file) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise DataError(f"{file}: {picture.width} x {picture.height} pixels are too many; scale it down")
                frames = getattr(picture, "n_frames", 1)
                if frames > 1 and picture.format != "MPO":  # telephones put a depth map or the like behind a JPEG
                    raise DataError(f"{file}: has {frames} frames; save the one you mean")
                yield picture
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{file}: has too many pixels; scale it down") from error
    except Exception as error:  # Pillow's readers raise what they like on damaged files
        reason = (str(error).replace(str(file), "it").strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, OSError) and error.errno in TROUBLE:
            raise DataError(f"{file}: cannot be read now ({reason}); mend what is wrong with the machine") from error
        raise BrokenPicture(file, f"{file}: not a readable picture ({reason}); replace or remove it") from error


def upright_size(file: Path) -> Size:
    """Width and height after the turn that EXIF asks for; pixels are decoded only of TIFFs and of PNGs with EXIF.

    Raises:
        DataError: as for `load_picture`; broken is also a PNG whose end is missing.
    """
    with _opened(file) as picture:
        if picture.format == "TIFF":
            picture.load()  # Pillow turns these itself, by then
            return picture.size
        width, height = picture.size
        if picture.format == "PNG" and not _png_may_be_turned(file):
            return width, height  # Pillow would decode it all to look
        return (height, width) if picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8) else (width, height)


def _png_may_be_turned(file: Path) -> bool:
    """Whether any chunk of a PNG, before or behind its pixels, could ask for a turn.

    Raises:
        BrokenPicture: it breaks off, be it behind the last pixel.
    """
    found = False
    with file.open("rb") as opened:
        opened.seek(8)
        while len(head := opened.read(8)) == 8:
            size, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"IEND":
                return found
            start = opened.read(min(size, 21))
            if kind == b"eXIf" or start.startswith((b"Raw profile type exif", b"XML:com.adobe.xmp")):
                found = True
            opened.seek(size - len(start) + 4, 1)
    raise BrokenPicture(file, f"{file}: not a readable picture (its end is missing); replace or remove it")


def is_transparent(file: Path) -> bool:
    """Whether a background shows behind the picture, by its header.

    Raises:
        DataError: as for `load_picture`.
    """
    with _opened(file) as picture:
        return picture.has_transparency_data


def load_picture(file: Path, background: str) -> Image.Image:
    """The picture upright, in sRGB, on `background` where it is transparent.

    Raises:
        BrokenPicture: unreadable, damaged, or no file.
        DataError: animated, too large, or in floating point.
    """
    with _opened(file) as picture:
        return _rgb(ImageOps.exif_transpose(picture), background, file)


def load_mask(file: Path) -> Image.Image:
    """A mask upright, in grey.

    Raises:
        DataError: as for `load_picture`.
    """
    return load_picture(file, "black").convert("L")


def load_depth(file: Path) -> Image.Image:
    """A depth map upright, with all the levels that it has.

    Raises:
        DataError: as for `load_picture`, and for one that is transparent.
    """
    with _opened(file) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.has_transparency_data:
            raise DataError(f"{file}: a depth map cannot be transparent; save it in grey")
        return upright.convert("F") if upright.mode[0] in "IF" else upright.convert("L").convert("F")


def load_alpha(file: Path) -> Image.Image:
    """How opaque a picture is, upright, in grey.

    Raises:
        DataError: as for `load_picture`.
    """
    with _opened(file) as picture:
        return ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")


def unloadable(files: Iterable[Path]) -> list[DataError]:
    """What is wrong with those of `files` that cannot be loaded."""
    wrong: list[DataError] = []
    for file in files:
        try:
            load_picture(file, "white")
        except DataError as error:
            wrong.append(noted(error))
    return wrong


def _rgb(picture: Image.Image, background: str, file: Path) -> Image.Image:
    if picture.mode == "F":
        raise DataError(f"{file}: holds floating-point values of unknown range; save it with 8 or 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion clips it to white
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{file}: holds integers of unknown range; save it with 8 or 16 bits")
        hidden, picture = picture.info.get("transparency"), Image.fromarray(((values + 128) // 257).astype(np.uint8))
        if hidden is not None:
            picture.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    if not picture.has_transparency_data:
        return _srgb(picture)
    whole = picture.convert("RGBA")
    colours = whole.convert("RGB")
    colours.info["icc_profile"] = picture.info.get("icc_profile")
    shown = _srgb(colours)
    shown.putalpha(whole.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", picture.size, background), shown).convert("RGB")


def _srgb(picture: Image.Image) -> Image.Image:
    """An opaque picture in sRGB, from the colours that its profile says it has (such as a telephone's Display P3)."""
    plain = picture if picture.mode in COLOURS else picture.convert("RGB")
    embedded = picture.info.get("icc_profile")
    with suppress(ImageCms.PyCMSError, OSError):  # a profile that cannot be read is passed over, as viewers do
        profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded or b""))
        said: Any = profile.profile
        is_srgb = "sRGB" in (said.profile_description or "")
        if said.xcolor_space.strip() == COLOURS.get(plain.mode, "RGB") and not is_srgb:
            plain = cast(Image.Image, ImageCms.profileToProfile(plain, profile, SRGB, outputMode="RGB"))
    return plain.convert("RGB")


def to_pixels(picture: Image.Image, crop: Crop, flip: bool) -> Tensor:
    """`crop` of an upright RGB picture, scaled (Lanczos): `[3, H, W]` float32 in [-1, 1]."""
    scaled = picture.resize(crop.bucket, Image.Resampling.LANCZOS, box=crop.box, reducing_gap=None)
    if flip:
        scaled = ImageOps.mirror(scaled)
    values = torch.from_numpy(np.array(scaled))
    return values.permute(2, 0, 1).float() / 127.5 - 1


def to_depth(depth: Image.Image, crop: Crop, flip: bool) -> Tensor:
    """`crop` of a depth map, scaled (Lanczos): `[1, H, W]` float32, its levels as they are."""
    scaled = depth.resize(crop.bucket, Image.Resampling.LANCZOS, box=crop.box)
    if flip:
        scaled = ImageOps.mirror(scaled)
    return torch.from_numpy(np.array(scaled))[None]


def to_weights(mask: Image.Image, crop: Crop, flip: bool, size: Size) -> Tensor:
    """`crop` of a grey picture, each of `size` cells the mean of what it covers: `[1, h, w]` float32 in [0, 1]."""
    scaled = mask.resize(size, Image.Resampling.BOX, box=crop.box)
    if flip:
        scaled = ImageOps.mirror(scaled)
    return torch.from_numpy(np.array(scaled))[None].float() / 255
