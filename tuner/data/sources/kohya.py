"""A folder laid out as kohya's trainers want it: sub-folders named `10_sks cat`, whose number is how often an epoch
shows each picture, and whose words are the caption of pictures that have none of their own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.data.example import Example, Size
from tuner.data.sources.base import NONE, Broken, Source, Wanted, read_all, whole
from tuner.data.sources.folder import PictureFolder
from tuner.errors import DataError, UserError


@dataclass(frozen=True, kw_only=True)
class Kohya:
    """Every picture in the numbered sub-folders of a folder."""

    path: Path
    """The folder that holds the numbered ones."""
    weight: float = 1.0
    """What each picture's loss is multiplied by."""
    source: str = "data"
    """What its pictures are called in reports; `class` for a folder of regularisation pictures."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}")

    def wanted(self, base: str, contents: str | None) -> Sequence[Wanted]:
        return ()

    def examples(self, unmade: Size | None = None) -> Sequence[Example]:
        return whole(*self.read(unmade))

    def read(self, unmade: Size | None = None, broken: Broken = NONE) -> tuple[Sequence[Example], Sequence[UserError]]:
        folders, wrong = self.folders()
        examples, faults = read_all(folders, broken)
        return examples, [*wrong, *faults]

    def folders(self) -> tuple[list[PictureFolder], list[DataError]]:
        """Each numbered folder; and what is wrong with others whose names say nothing.

        Raises:
            DataError: there is none of both.
        """
        root = self.path.expanduser()
        if not root.is_dir():
            raise DataError(f"{self.path}: no such folder")
        named = {folder: re.fullmatch(r"(\d+)_(.*)", folder.name) for folder in sorted(root.iterdir())}
        found: list[PictureFolder] = []
        wrong: list[DataError] = []
        for folder, name in named.items():
            if folder.name.startswith("."):
                continue
            if name is None or int(name[1]) < 1:
                what = "folder" if folder.is_dir() else "file"
                message = (
                    f"{folder}: a {what} whose name does not begin with a number above 0 and `_`; rename it as in "
                    "`10_sks cat`, move it elsewhere, or take type = 'folder'"
                )
                wrong.append(DataError(message))
                continue
            words = name[2].replace("_", " ").strip() or None
            repeats = int(name[1])
            found.append(
                PictureFolder(path=folder, fallback=words, repeats=repeats, weight=self.weight, source=self.source)
            )
        if not found and not wrong:
            raise DataError(f"{self.path}: no folder in it is named as in `10_sks cat`; take type = 'folder'")
        return found, wrong


SPEC: type[Source] = Kohya
