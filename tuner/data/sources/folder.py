"""A folder of pictures, each with a `.txt` caption beside it, or all with one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.data.captions import read_caption
from tuner.data.example import Example
from tuner.data.images import SUFFIXES, upright_size
from tuner.data.sources.base import Source, Wanted
from tuner.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PictureFolder:
    """Every picture below a folder."""

    path: Path
    """The folder; sub-folders are read too."""
    prompt: str | None = None
    """The caption of every picture; where left out, `name.txt` beside `name.png` holds it."""
    repeats: int = 1
    """How many times an epoch shows each picture."""
    weight: float = 1.0
    """What each picture's loss is multiplied by."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}")

    def wanted(self, base: str) -> Sequence[Wanted]:
        return ()

    def examples(self) -> Sequence[Example]:
        return [
            Example(
                image=image,
                size=size,
                caption=read_caption(image.with_suffix(".txt")) if self.prompt is None else self.prompt,
                weight=self.weight,
                repeats=self.repeats,
            )
            for image, size in self._pictures()
        ]

    def _pictures(self) -> list[tuple[Path, tuple[int, int]]]:
        pictures = find_pictures(self.path)
        if not pictures:
            raise DataError(f"{self.path}: no picture in it ({', '.join(sorted(SUFFIXES))}); give another folder")
        if self.prompt is None:
            bare = [image for image in pictures if not image.with_suffix(".txt").is_file()]
            if bare:
                raise DataError(
                    f"{self.path}: {len(bare)} of {len(pictures)} pictures have no caption, the first is "
                    f"{bare[0].name}; write {bare[0].with_suffix('.txt').name}, or give all one `prompt`"
                )
            _refuse_shared_captions(pictures)
        sizes, broken = [], []
        for image in pictures:
            try:
                sizes.append((image, upright_size(image)))
            except DataError as error:
                broken.append(str(error))
        if broken:
            raise DataError("\n".join(broken))
        return sizes


def find_pictures(folder: Path) -> list[Path]:
    """Every picture below `folder`, by its path; hidden files and folders are left out.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.expanduser().is_dir():
        raise DataError(f"{folder}: no such folder")
    root = folder.expanduser()
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )


def _refuse_shared_captions(pictures: Sequence[Path]) -> None:
    by_caption: dict[Path, Path] = {}
    for image in pictures:
        other = by_caption.setdefault(image.with_suffix(".txt"), image)
        if other != image:
            raise DataError(f"{image}: shares its caption file with {other.name}; rename one of them")


SPEC: type[Source] = PictureFolder
