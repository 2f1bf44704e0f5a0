import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from tuner.data.buckets import Buckets, Crop, centre_crop
from tuner.data.images import Pictures, is_transparent, load_picture, to_pixels, upright_size
from tuner.data.sources.folder import PictureFolder
from tuner.errors import DataError

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What each EXIF orientation asks for, by EXIF 2.3, page 30."""


def quadrants(size: tuple[int, int] = (96, 48)) -> Image.Image:
    """Four plain colours, so that every turn shows, also after lossy compression."""
    picture = Image.new("RGB", size)
    for index, colour in enumerate(["red", "lime", "blue", "white"]):
        width, height = size[0] // 2, size[1] // 2
        picture.paste(Image.new("RGB", (width, height), colour), (index % 2 * width, index // 2 * height))
    return picture


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_a_picture_is_turned_as_exif_says_and_its_bucket_is_that_of_the_turned_size(suffix, turn, tmp_path: Path):
    file = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = turn
    quadrants().save(file, exif=exif, quality=95)

    upright = quadrants().transpose(TURNS[turn]) if turn in TURNS else quadrants()
    loaded = load_picture(file, "white")
    assert array(loaded).tolist() == array(ImageOps.exif_transpose(Image.open(file)).convert("RGB")).tolist()
    assert loaded.size == upright.size and abs(array(loaded) - array(upright)).mean() < 6

    (example,) = PictureFolder(path=tmp_path, prompt="a thing").examples()
    assert example.size == upright.size
    bucket = Buckets(resolution=64, step=8).nearest(example.size)
    assert (bucket[0] < bucket[1]) == (turn >= 5)


def chunks(file: Path) -> list[bytes]:
    """A PNG's chunks, the signature first."""
    data, at, found = file.read_bytes(), 8, []
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        found.append(data[at:end])
        at = end
    return [data[:8], *found]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_png_is_turned_also_where_exif_stands_behind_the_pixels(tmp_path: Path):
    file = tmp_path / "late.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    quadrants().save(file, exif=exif)
    parts = chunks(file)
    (late,) = [part for part in parts if part[4:8] == b"eXIf"]
    file.write_bytes(b"".join([*(part for part in parts[:-1] if part is not late), late, parts[-1]]))
    assert upright_size(file) == load_picture(file, "white").size == (48, 96)


def test_a_png_is_turned_also_where_xmp_says_so(tmp_path: Path):
    file = tmp_path / "xmp.png"
    quadrants().save(file)
    text = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    parts = chunks(file)
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text)
    file.write_bytes(b"".join([*parts[:-1], xmp, parts[-1]]))
    assert upright_size(file) == load_picture(file, "white").size == (48, 96)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_size_is_found_without_decoding(suffix, tmp_path: Path, monkeypatch):
    file = tmp_path / f"picture.{suffix}"
    quadrants().save(file)

    def decode(self: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    assert upright_size(file) == (96, 48)


def test_a_sixteen_bit_grey_ramp_keeps_its_range(tmp_path: Path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for name in ("ramp.png", "ramp.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        values = array(load_picture(tmp_path / name, "white"))
        assert values.mean() == pytest.approx(127.5, abs=0.5)
        assert len(np.unique(values)) == 256
        assert (np.diff(values[..., 0].reshape(-1)) >= 0).all()


def test_eight_bits_survive_being_stored_in_sixteen(tmp_path: Path):
    grey = np.arange(256, dtype=np.uint16)[None].repeat(4, 0) * 257
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert array(load_picture(tmp_path / "grey.png", "white"))[0, :, 0].tolist() == list(range(256))


def palette_with_a_hole() -> Image.Image:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])  # 0 is red and transparent, 1 is blue
    picture.paste(0, (0, 0, 4, 8))
    picture.info["transparency"] = 0
    return picture


def half(mode: str, shown: object, hidden: object) -> Image.Image:
    picture = Image.new(mode, (8, 8), shown)
    picture.paste(hidden, (0, 0, 4, 8))
    return picture


BACKGROUND = (10, 200, 30)
KINDS = {
    "grey": ("png", Image.new("L", (8, 8), 77), (77, 77, 77), (77, 77, 77)),
    "one bit": ("png", half("1", 1, 0), (0, 0, 0), (255, 255, 255)),
    "palette with transparency": ("png", palette_with_a_hole(), BACKGROUND, (0, 0, 255)),
    "grey with alpha": ("png", half("LA", (77, 255), (200, 0)), BACKGROUND, (77, 77, 77)),
    "hidden red": ("png", half("RGBA", (0, 0, 255, 255), (255, 0, 0, 0)), BACKGROUND, (0, 0, 255)),
    "hidden red in webp": ("webp", half("RGBA", (0, 0, 255, 255), (255, 0, 0, 0)), BACKGROUND, (0, 0, 255)),
    "half transparent": ("png", half("RGBA", (0, 0, 255, 255), (210, 0, 30, 128)), (110, 100, 30), (0, 0, 255)),
    "cmyk": ("jpg", half("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)), (255, 0, 0), (255, 255, 255)),
    "cmyk tiff": ("tif", half("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)), (255, 0, 0), (255, 255, 255)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_becomes_rgb_on_the_stated_background(kind, tmp_path: Path):
    suffix, picture, left, right = KINDS[kind]
    file = tmp_path / f"picture.{suffix}"
    picture.save(file, **({"quality": 100} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}))
    loaded = load_picture(file, "#0ac81e")  # BACKGROUND
    assert loaded.mode == "RGB"
    for colour, at in ((left, (1, 4)), (right, (6, 4))):
        assert loaded.getpixel(at) == pytest.approx(colour, abs=4 if suffix == "jpg" else 1), kind
    assert is_transparent(file) == ("trans" in kind or "alpha" in kind or "hidden" in kind)


def profile(
    red: tuple[float, float, float], green: tuple[float, float, float], blue: tuple[float, float, float]
) -> bytes:
    """A minimal colour profile (ICC.1:2001-04): three primaries in XYZ (D50), and a gamma of 2.2."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values: tuple[float, float, float]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    name = b"swapped\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz((0.9642, 1.0, 0.8249)),
        b"rXYZ": xyz(red),
        b"gXYZ": xyz(green),
        b"bXYZ": xyz(blue),
        **dict.fromkeys(
            (b"rTRC", b"gTRC", b"bTRC"), b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
        ),
    }
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 0, b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    whole = head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


SRGB = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_are_those_that_the_profile_means(mode, tmp_path: Path):
    """In this profile red is what is green in sRGB, and the other way round."""
    red, green, blue = SRGB
    swapped = half("RGB", (255, 0, 0), (0, 128, 0)).convert(mode)
    swapped.save(tmp_path / "swapped.png", icc_profile=profile(green, red, blue))
    loaded = load_picture(tmp_path / "swapped.png", "white")
    assert loaded.getpixel((6, 4)) == pytest.approx((0, 255, 0), abs=3)
    assert loaded.getpixel((1, 4)) == pytest.approx((128, 0, 0), abs=3)


def test_an_srgb_profile_or_one_that_cannot_be_read_changes_nothing(tmp_path: Path):
    from PIL import ImageCms

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for index, embedded in enumerate([srgb, b"no profile at all", profile(*SRGB)[:90]]):
        noise.save(tmp_path / f"{index}.png", icc_profile=embedded)
        assert array(load_picture(tmp_path / f"{index}.png", "white")).tolist() == array(noise).tolist()


def test_values_of_unknown_range_are_refused(tmp_path: Path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 1_000_000, dtype=np.int32)).save(tmp_path / "large.tif")
    for name in ("float.tif", "large.tif"):
        with pytest.raises(DataError, match=rf"{name}: holds .* of unknown range; save it with 8 or 16 bits"):
            load_picture(tmp_path / name, "white")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif", "avif"])
def test_several_frames_are_refused(suffix, tmp_path: Path):
    file = tmp_path / f"moving.{suffix}"
    quadrants().save(file, save_all=True, append_images=[Image.new("RGB", (96, 48))])
    with pytest.raises(DataError, match=rf"moving.{suffix}: has 2 frames"):
        upright_size(file)


def test_a_telephones_jpeg_with_a_second_picture_behind_is_its_first(tmp_path: Path):
    data = io.BytesIO()
    quadrants().save(data, "MPO", save_all=True, append_images=[Image.new("RGB", (96, 48))], quality=95)
    (tmp_path / "photo.jpg").write_bytes(data.getvalue())
    with Image.open(tmp_path / "photo.jpg") as picture:
        assert picture.format == "MPO"
    assert abs(array(load_picture(tmp_path / "photo.jpg", "white")) - array(quadrants())).mean() < 6


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, and has next to nothing of it."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(20_000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(13_000, 13_000), (20_000, 20_000), (65_535, 65_535)])
def test_a_bomb_is_refused_from_its_header(size, tmp_path: Path, monkeypatch):
    file = tmp_path / "bomb.png"
    file.write_bytes(png_header(*size))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    since = time.monotonic()
    for look in (upright_size, is_transparent, lambda file: load_picture(file, "white")):
        with pytest.raises(DataError, match=r"bomb.png: .*pixels"):
            look(file)
    assert time.monotonic() - since < 1


def damaged(folder: Path) -> set[str]:
    """A folder in which each picture but one is broken in its own way; the names of the broken ones."""
    quadrants((640, 480)).save(folder / "good.jpg")
    jpeg = (folder / "good.jpg").read_bytes()
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(data, "PNG")
    png = data.getvalue()
    bad_crc = bytearray(png)
    bad_crc[30] ^= 255
    files = {
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": png[: len(png) // 2],
        "end.jpg": jpeg[:-16],
        "header.jpg": jpeg[:200],
        "header.png": png[:33],
        "zero.png": b"",
        "page.png": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "crc.png": bytes(bad_crc),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.jpg")
    return {*files, "folder.png", "gone.png", "pipe.jpg"}


def test_all_broken_pictures_are_named_in_one_go_each_in_a_line(tmp_path: Path):
    broken = damaged(tmp_path)
    with pytest.raises(DataError) as caught:
        PictureFolder(path=tmp_path, prompt="a thing").examples()
    lines = str(caught.value).split("\n")
    assert {Path(line.split(": ")[0]).name for line in lines} == broken
    assert len(lines) == len(broken)
    for line in lines:
        assert line.endswith(("replace or remove it", "remove it, or give it another name"))


def test_broken_pictures_and_captions_are_named_together(tmp_path: Path):
    for name in ("a", "b", "c"):
        quadrants().save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a thing")
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfea\0")
    with pytest.raises(DataError, match=r"(?s)a.png: .*b.txt: not UTF-8 at byte 0") as caught:
        PictureFolder(path=tmp_path).examples()
    assert "c." not in str(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (4000, 1), (1, 4000), (37, 53)])
def test_any_size_becomes_its_buckets(size):
    buckets = Buckets(resolution=64, step=8)
    bucket = buckets.nearest(size)
    pixels = to_pixels(Image.new("RGB", size, (255, 0, 128)), centre_crop(size, bucket), flip=False)
    assert pixels.shape == (3, bucket[1], bucket[0]) and pixels.dtype == torch.float32
    assert pixels.mean((1, 2)).tolist() == pytest.approx([1, -1, 128 / 127.5 - 1], abs=1e-5)


def test_pixels_are_the_crop_and_nothing_else():
    picture = quadrants()
    pixels = to_pixels(picture, Crop((96, 48), (48, 48), left=48, top=0), flip=False)  # top right: lime
    assert pixels[:, :24].flatten(1).unique(dim=1).tolist() == [[-1], [1], [-1]]


def test_a_flip_mirrors_left_to_right():
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    crop = centre_crop(noise.size, (48, 32))
    plain, flipped = (to_pixels(noise, crop, flip) for flip in (False, True))
    assert torch.equal(flipped, plain.flip(2)) and not torch.equal(flipped, plain)


@pytest.mark.parametrize(
    "wrong",
    [
        {"background": "whitish"},
        {"background": "#ff000080"},
        {"background": "rgba(1, 2, 3, 4)"},
        {"latents": "sampled"},
        {"resolution": 0},
        {"bucket_step": -8},
        {"max_ratio": 0.5},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Pictures(**wrong)
