"""A folder of pictures, each with a `.txt` caption beside it, or all with one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.data.captions import read_caption
from tuner.data.example import Example, Size
from tuner.data.images import OTHER_SUFFIXES, SUFFIXES, broken_pictures, upright_size
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

    def wanted(self, base: str, contents: str | None) -> Sequence[Wanted]:
        return ()

    def examples(self, unmade: Size | None = None) -> Sequence[Example]:
        examples: list[Example] = []
        broken: list[str] = []
        for image in self._pictures():
            try:
                examples.append(
                    Example(
                        image=image,
                        size=upright_size(image),
                        caption=read_caption(image.with_suffix(".txt")) if self.prompt is None else self.prompt,
                        weight=self.weight,
                        repeats=self.repeats,
                    )
                )
            except DataError as error:
                broken.append(str(error))
        if broken:  # then pixels are read too, so that all that is broken is named at once
            raise DataError("\n".join([*broken, *broken_pictures([example.image for example in examples])]))
        return examples

    def _pictures(self) -> list[Path]:
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
        return pictures


def find_pictures(folder: Path) -> list[Path]:
    """Every picture below `folder`, by its path; hidden files and folders are left out.

    Raises:
        DataError: there is no such folder, or pictures in it are of a kind that is not read.
    """
    root = folder.expanduser()
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder")
    seen = [p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    if other := sorted(path for path in seen if path.suffix.lower() in OTHER_SUFFIXES):
        raise DataError(
            f"{folder}: {len(other)} pictures are of a kind that is not read, the first is {other[0].name}; save them "
            "as PNG or JPEG, or move them elsewhere"
        )
    return sorted(path for path in seen if path.suffix.lower() in SUFFIXES)


def _refuse_shared_captions(pictures: Sequence[Path]) -> None:
    by_caption: dict[Path, Path] = {}
    for image in pictures:
        other = by_caption.setdefault(image.with_suffix(".txt"), image)
        if other != image:
            raise DataError(f"{image}: shares its caption file with {other.name}; rename one of them")


SPEC: type[Source] = PictureFolder
