"""A folder of pictures, each with a `.txt` or `.caption` file beside it, or all with one prompt."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.data.ahead import ahead
from tuner.data.captions import read_caption
from tuner.data.example import Example, Size
from tuner.data.images import OTHER_SUFFIXES, SUFFIXES, noted
from tuner.data.sources.base import NONE, Broken, Source, Wanted, left, refuse_other_size, size_of, whole
from tuner.errors import DataError, UserError

CAPTIONS = (".txt", ".caption")


@dataclass(frozen=True, kw_only=True)
class PictureFolder:
    """Every picture below a folder."""

    path: Path
    """The folder; sub-folders are read too."""
    prompt: str | None = None
    """The caption of every picture; where left out, `name.txt` or `name.caption` beside `name.png` holds it."""
    fallback: str | None = None
    """The caption of pictures that have no caption file."""
    masks: Path | None = None
    """A folder of masks, laid out and named as the pictures' (`name.png`): white counts in the loss, black does not."""
    guides: Path | None = None
    """For bases that are told more than captions, a folder like `masks`: masks of what is to be painted (white), depth
    maps, or the pictures as they were before the edit. Inpainting draws its own where it is left out."""
    repeats: int = 1
    """How many times an epoch shows each picture."""
    weight: float = 1.0
    """What each picture's loss is multiplied by."""
    source: str = "data"
    """What its pictures are called in reports."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}")
        if self.prompt is not None and self.fallback is not None:
            raise ValueError("fallback has no effect with prompt, which is the caption of every picture; give one")

    def wanted(self, base: str, contents: str | None) -> Sequence[Wanted]:
        return ()

    def uncaptioned(self) -> Source:
        return replace(self, prompt="", fallback=None)

    def examples(self, unmade: Size | None = None) -> Sequence[Example]:
        return whole(*self.read(unmade))

    def read(self, unmade: Size | None = None, broken: Broken = NONE) -> tuple[Sequence[Example], Sequence[UserError]]:
        pictures = self._pictures()
        captions = {} if self.prompt is not None else self._caption_files(pictures)
        masks = self._beside(pictures, self.masks, "mask", "draw them (all white counts everywhere)")
        guides = self._beside(pictures, self.guides, "guide", "make them")
        examples: list[Example] = []
        wrong: list[UserError] = []
        with closing(ahead(pictures, lambda image: size_of(image, broken))) as sizes:
            for image in pictures:
                try:
                    size = next(sizes)()
                    for other in (masks.get(image), guides.get(image)):
                        if other is not None:
                            refuse_other_size(other, size)
                    caption = self.prompt if self.prompt is not None else self.fallback
                    if image in captions:
                        caption = read_caption(captions[image])
                    assert caption is not None
                    examples.append(
                        Example(
                            image=image,
                            size=size,
                            caption=caption,
                            mask=masks.get(image),
                            guide=guides.get(image),
                            weight=self.weight,
                            repeats=self.repeats,
                            source=self.source,
                        )
                    )
                except DataError as error:
                    wrong.append(noted(error))
        return examples, left(examples, wrong)

    def _pictures(self) -> list[Path]:
        pictures = find_pictures(self.path)
        if not pictures:
            raise DataError(f"{self.path}: no picture in it ({', '.join(sorted(SUFFIXES))}); give another folder")
        return pictures

    def _caption_files(self, pictures: Sequence[Path]) -> dict[Path, Path]:
        found: dict[Path, Path] = {}
        captions = captions_of(below(self.path.expanduser())[0])
        for image in pictures:
            there = captions[image.with_suffix("")]
            if len(there) > 1:
                raise DataError(f"{image}: has two captions, {' and '.join(f.name for f in there)}; remove one of them")
            if there:
                found[image] = there[0]
        bare = [image for image in pictures if image not in found and image.is_file()]  # others are broken anyway
        if bare and self.fallback is None:
            raise DataError(
                f"{self.path}: {len(bare)} of {len(pictures)} pictures have no caption, the first is "
                f"{bare[0].name}; write {bare[0].with_suffix('.txt').name}, or give all one `prompt`"
            )
        _refuse_shared(found, "caption file")
        return found

    def _beside(self, pictures: Sequence[Path], folder: Path | None, what: str, how: str) -> dict[Path, Path]:
        """The picture of the same name in another folder, for each."""
        if folder is None:
            return {}
        names = {image: image.relative_to(self.path.expanduser()).with_suffix("") for image in pictures}
        by_name: dict[Path, Path] = {}
        for file in find_pictures(folder):
            other = by_name.setdefault(file.relative_to(folder.expanduser()).with_suffix(""), file)
            if other != file:
                raise DataError(f"{file}: is a {what} of the same picture as {other.name}; remove one of them")
        _refuse_shared(names, what)
        bare = [image for image, name in names.items() if name not in by_name and image.is_file()]
        if bare:
            raise DataError(
                f"{folder}: {len(bare)} of {len(pictures)} pictures have no {what}, the first is {bare[0].name}; "
                f"{how}, or leave `{what}s` out"
            )
        return {image: by_name[name] for image, name in names.items() if name in by_name}


def find_pictures(folder: Path) -> list[Path]:
    """Every picture below `folder`, by its path; hidden files and folders are left out.

    Raises:
        DataError: there is no such folder, one in it cannot be read, or pictures are of a kind that is not read.
    """
    root = folder.expanduser()
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder")
    seen, wrong = below(root)
    if wrong:
        raise DataError("\n".join(wrong))
    if other := sorted(path for path in seen if path.suffix.lower() in OTHER_SUFFIXES):
        raise DataError(
            f"{folder}: {len(other)} pictures are of a kind that is not read, the first is {other[0].name}; save them "
            "as PNG or JPEG, or move them elsewhere"
        )
    return sorted(path for path in seen if path.suffix.lower() in SUFFIXES)


def below(root: Path) -> tuple[list[Path], list[str]]:
    """All that lies below a folder, and what is wrong with folders that are not looked into; hidden ones are left out.

    Links to folders are not followed, as they may go round; what is behind them is not passed over in silence.
    """
    seen: list[Path] = []
    links: list[Path] = []
    failed: list[OSError] = []
    for place, folders, files in os.walk(root, onerror=failed.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links += [path for path in (Path(place, name) for name in folders) if path.is_symlink()]
        seen += [Path(place, name) for name in (*folders, *files) if not name.startswith(".")]
    wrong = [f"{e.filename}: cannot be read ({e.strerror}); change its rights, or move it away" for e in failed]
    what = "is a link to a folder, which is not followed; name that as a source of its own, and remove the link"
    return seen, wrong + [f"{link}: {what}" for link in sorted(links)]


def captions_of(files: Iterable[Path]) -> dict[Path, list[Path]]:
    """Those of `files` that are captions, by their name without its ending; nothing for any other name."""
    found: dict[Path, list[Path]] = defaultdict(list)
    for file in sorted(files):
        if file.suffix.lower() in CAPTIONS:
            found[file.with_suffix("")].append(file)
    return found


def _refuse_shared(beside: Mapping[Path, Path], what: str) -> None:
    """`beside` is what belongs to each picture."""
    owners: dict[Path, Path] = {}
    for image, file in beside.items():
        other = owners.setdefault(file, image)
        if other != image:
            raise DataError(f"{image}: shares its {what} with {other.name}; rename one of them")


SPEC: type[Source] = PictureFolder
