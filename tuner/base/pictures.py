"""The base model's pictures: Noto emoji drawings on plain backgrounds, with captions that name both.

`python -m tuner.base.pictures --icons PACKAGE --out FOLDER` draws, from the icons of `@iconify-json/noto` (Apache-2.0):

    train/        every shown object on every colour, less the held-out pairs, twice (scale and place differ a little)
    validation/   the held-out pairs of shown objects, once
    unseen/       objects that are in neither, for adaptation
    glyphs/       cut-outs with transparency of all drawings but the unseen ones, for the autoencoder

`<object>--<colour>--<k>.png` is 128 x 128 sRGB and has its caption beside it in `.txt`.
The same input gives the same bytes.
"""

import argparse
import hashlib
import io
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = 128
"""Side of a picture, and of the icons' own view box."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (205, 35, 45),
    "yellow": (255, 214, 60),
    "green": (40, 150, 75),
    "blue": (45, 105, 215),
    "purple": (120, 60, 175),
    "pink": (255, 160, 205),
    "black": (20, 20, 22),
}
"""The backgrounds, sRGB. `evaluate` measures samples against the same table."""

HELD_OUT_SHARE = 8
"""One object x colour pair in this many is never trained on."""

CAMOUFLAGE = 0.7
"""Pairs where more than this share of the drawing is as good as the background's colour are left out."""


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("objects.toml").read_text(encoding="utf-8"))


def objects() -> dict[str, list[str]]:
    """Icon names under `shown` and `unseen`."""
    return {split: list(_table()[split]) for split in ("shown", "unseen")}


def object_name(icon: str) -> str:
    """What a caption calls an icon: `red-apple` is a "red apple"."""
    return _table()["called"].get(icon, icon.replace("-", " "))


def caption(icon: str, colour: str) -> str:
    """The caption of an object on a background."""
    return f"{object_name(icon)} on a {colour} background"


def held_out(icon: str, colour: str) -> bool:
    """Whether the pair belongs to validation: a pure function of its names."""
    return _hash(icon, colour) % HELD_OUT_SHARE == 0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the drawing lies: its view box's share of the picture, and its centre's offset in pixels."""

    scale: float
    right: float
    down: float


def placement(icon: str, colour: str, variant: int) -> Placement:
    """The scale (0.72 to 0.86) and offset (up to 4 px) of a variant: a pure function of its names."""
    draws = [_hash(icon, colour, str(variant), what) % 1001 / 1000 for what in ("scale", "right", "down")]
    return Placement(scale=0.72 + 0.14 * draws[0], right=8 * draws[1] - 4, down=8 * draws[2] - 4)


class Icons:
    """The drawings of an unpacked `@iconify-json` package."""

    def __init__(self, package: Path) -> None:
        content: dict[str, Any] = json.loads((package / "icons.json").read_text(encoding="utf-8"))
        self._bodies: dict[str, str] = {name: icon["body"] for name, icon in content["icons"].items()}
        self._bodies |= {
            name: self._bodies[alias["parent"]]
            for name, alias in content.get("aliases", {}).items()
            if alias["parent"] in self._bodies
        }
        self._names = [name for name, icon in content["icons"].items() if not icon.get("hidden")]

    def names(self) -> list[str]:
        """All drawings but skin-tone variants, sorted."""
        return sorted(name for name in self._names if "skin-tone" not in name)

    def draw(
        self, icon: str, place: Placement, colour: tuple[int, int, int] | None, *, size: int = SIZE
    ) -> Image.Image:
        """An RGB picture on a background, or an RGBA cut-out without one.

        Raises: KeyError: no icon has that name.
        """
        import resvg_py

        margin = SIZE * (1 - place.scale) / 2
        background = "" if colour is None else f'<rect width="{SIZE}" height="{SIZE}" fill="rgb{colour}"/>'
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {SIZE} {SIZE}">'
            f'{background}<g transform="translate({margin + place.right:.3f} {margin + place.down:.3f}) '
            f'scale({place.scale:.5f})">{self._bodies[icon]}</g></svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        return Image.open(io.BytesIO(png)).convert("RGBA" if colour is None else "RGB")


def camouflaged(cutout: Image.Image, colour: tuple[int, int, int]) -> bool:
    """Whether a drawing (RGBA) would hardly be seen on a background of that colour."""
    opaque = [pixel for count, pixel in _colours(cutout) if pixel[3] > 127 for _ in range(count)]
    near = sum(all(abs(a - b) < 40 for a, b in zip(pixel[:3], colour, strict=True)) for pixel in opaque)
    return near > CAMOUFLAGE * max(1, len(opaque))


def pictures(icons: Icons) -> Iterator[tuple[str, str, str, int]]:
    """All pictures as (split, icon, colour, variant)."""
    for split, names in objects().items():
        for icon in names:
            cutout = icons.draw(icon, Placement(scale=1.0, right=0, down=0), None, size=64)
            for colour, value in COLOURS.items():
                if camouflaged(cutout, value):
                    continue
                if split == "unseen":
                    yield "unseen", icon, colour, 0
                elif held_out(icon, colour):
                    yield "validation", icon, colour, 0
                else:
                    yield from (("train", icon, colour, variant) for variant in range(2))


def write(icons: Icons, out: Path) -> dict[str, int]:
    """Draw everything into `out`; how many pictures each folder got."""
    counts: dict[str, int] = {}
    for split, icon, colour, variant in pictures(icons):
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{icon}--{colour}--{variant}"
        icons.draw(icon, placement(icon, colour, variant), COLOURS[colour]).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption(icon, colour) + "\n", encoding="utf-8")
        counts[split] = counts.get(split, 0) + 1
    (out / "glyphs").mkdir(parents=True, exist_ok=True)
    for icon in sorted(set(icons.names()) - set(objects()["unseen"])):
        icons.draw(icon, Placement(scale=1.0, right=0, down=0), None).save(out / "glyphs" / f"{icon}.png")
        counts["glyphs"] = counts.get("glyphs", 0) + 1
    return counts


def _hash(*names: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(names).encode()).digest()[:8], "big")


def _colours(picture: Image.Image) -> list[tuple[int, tuple[int, int, int, int]]]:
    return picture.getcolors(picture.width * picture.height) or []  # pyright: ignore[reportReturnType]


def main() -> None:
    """Draw the data set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--icons", type=Path, required=True, help="the unpacked package @iconify-json/noto")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    for split, count in write(Icons(arguments.icons), arguments.out).items():
        print(f"{split}: {count}")


if __name__ == "__main__":
    main()
