"""A Hugging Face data set: of the hub, saved to disk, or parquet files (the `datasets` library reads them)."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.data.example import Example, Size
from tuner.data.sources.base import NONE, Broken, Source, Wanted, left, whole
from tuner.data.unpacked import Packed, stamps, unpack, weighed
from tuner.errors import ConfigError, DataError, UnsafeError, UserError

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words in files' names by which the hub tells splits."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Every picture of a split; they are streamed and laid out as files once, in the cache."""

    path: str
    """A hub id, a folder written by `save_to_disk`, a parquet file or a folder of them."""
    revision: str | None = None
    """Of a hub id: a branch, tag or commit."""
    name: str | None = None
    """Of a hub id: the configuration, where there are several."""
    split: str = "train"
    """Which part. Of parquet files in a folder it is told by their names, such as `data/test-00000-of-00002.parquet` or
    `test/0.parquet`; where no name tells any, all are `train`."""
    image: str = "image"
    """The column of the pictures."""
    caption: str = "text"
    """The column of the captions; a list in it is alternatives."""
    limit: int | None = None
    """Only so many of its pictures, from the first on."""
    repeats: int = 1
    """How many times an epoch shows each picture."""
    weight: float = 1.0
    """What each picture's loss is multiplied by."""

    def __post_init__(self) -> None:
        for name in ("repeats", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}")

    def wanted(self, base: str, contents: str | None) -> Sequence[Wanted]:
        return ()

    def examples(self, unmade: Size | None = None) -> Sequence[Example]:
        return whole(*self.read(unmade))

    def read(self, unmade: Size | None = None, broken: Broken = NONE) -> tuple[Sequence[Example], Sequence[UserError]]:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError("data: type = 'dataset' needs the datasets library: pip install datasets") from error
        local = Path(self.path).expanduser()
        parquet: list[Path] = []
        saved = False
        if local.is_dir():
            saved = any((local / file).is_file() for file in ("state.json", "dataset_dict.json"))
            parquet = [] if saved else sorted(local.rglob("*.parquet"))
            if not saved and not parquet:
                raise DataError(f"{self.path}: neither a saved data set nor a folder of parquet files")
            parquet = self._of_split(local, parquet)
        elif local.is_file():
            parquet = [local]
            if self.split not in ("train", split_of(local.name)):
                raise DataError(f"{self.path}: does not say that it is {self.split!r}; leave `split` out")
        for option in ("revision", "name"):
            if (saved or parquet) and getattr(self, option) is not None:
                raise ConfigError(
                    f"data: {option} is said of {self.path}, which is here and not on the hub; leave it out"
                )
        identity: dict[str, object] = {
            "kind": "dataset", "path": self.path, "name": self.name, "split": self.split,
            "commit": None if parquet or saved else self._commit(),
            "image": self.image, "caption": self.caption, "limit": self.limit,
            "files": stamps(parquet or (sorted(local.rglob("*.arrow")) if saved else [])),
        }  # fmt: skip

        def opened() -> Any:
            try:
                if saved:
                    found = datasets.load_from_disk(str(local))
                    if isinstance(found, datasets.DatasetDict):
                        if self.split not in found:
                            raise DataError(
                                f"{self.path}: has no split {self.split!r}, only {', '.join(map(str, found))}"
                            )
                        found = found[self.split]
                    elif self.split not in ("train", str(found.split)):
                        raise DataError(f"{self.path}: does not say that it is {self.split!r}; leave `split` out")
                    return found
                if parquet:
                    files = [str(file) for file in parquet]
                    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
                return datasets.load_dataset(
                    self.path, self.name, split=self.split, revision=self.revision, streaming=True
                )
            except UserError:
                raise
            except Exception as error:  # the library raises what it likes
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise DataError(f"{self.path}: cannot be opened as a data set ({reason})") from error

        found, wrong = unpack(identity, self.path, lambda: self._read(opened()), broken)
        return weighed(found, self.weight, self.repeats), left(found, wrong)

    def _of_split(self, folder: Path, files: Sequence[Path]) -> list[Path]:
        """Those of parquet files in a folder that belong to the split."""
        said = {file: split_of(str(file.relative_to(folder))) for file in files}
        there = sorted({split for split in said.values() if split is not None})
        silent = [file for file, split in said.items() if split is None]
        if there and silent:
            raise DataError(
                f"{silent[0]}: its name tells no split, but those of others do ({', '.join(there)}); rename it, or "
                "give one file as path"
            )
        found = [file for file, split in said.items() if (split or "train") == self.split]
        if files and not found:
            raise DataError(f"{self.path}: has no split {self.split!r}, only {', '.join(there or ['train'])}")
        return found

    def _commit(self) -> str:
        """The commit of a hub id: a branch may hold something else tomorrow."""
        import huggingface_hub

        if self.revision is not None and re.fullmatch("[0-9a-f]{40}", self.revision):
            return self.revision
        try:
            commit = huggingface_hub.HfApi().dataset_info(self.path, revision=self.revision).sha
        except Exception as error:  # the hub's client raises what it likes without a net
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{self.path}: is no file or folder here and could not be had from the hub ({reason}); without a "
                "connection, give the full commit as `revision` of one that was unpacked before"
            ) from error
        return str(commit)

    def _read(self, table: Any) -> Iterator[Packed]:
        import datasets

        columns = table.column_names
        for option in ("image", "caption"):
            if columns is not None and getattr(self, option) not in columns:
                raise DataError(
                    f"{self.path}: has no column {getattr(self, option)!r}, only {', '.join(columns)}; "
                    f"name it in the source's `{option}`"
                )
        if isinstance((table.features or {}).get(self.image), datasets.Image):
            table = table.cast_column(self.image, datasets.Image(decode=False))
        said = (table.features or {}).get(self.caption)
        classes = said.names if isinstance(said, datasets.ClassLabel) else None
        number = 0
        try:
            for number, row in enumerate(table):
                if self.limit is not None and number >= self.limit:
                    return
                yield self._packed(f"{self.path}: row {number}", row[self.image], _said(row[self.caption], classes))
        except Exception as error:  # the library raises what it likes of damaged files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            at = f"{self.path}: row {number} or the next"
            yield Packed(at, wrong=DataError(f"{at}: cannot be read ({reason}); make it again"))

    def _packed(self, place: str, picture: Any, said: Any) -> Packed:
        lines = said if isinstance(said, list) else [said]
        caption = "\n".join(str(line) for line in lines if line is not None)
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        if isinstance(content, bytes) and content:
            return Packed(place, content, caption)
        try:
            file = self._file(place, picture)
            return Packed(place, file.read_bytes(), caption, beside=file)
        except (DataError, UnsafeError) as error:
            return Packed(place, wrong=error)

    def _file(self, place: str, picture: Any) -> Path:
        """The picture's file where the row says, inside the data set's folder.

        Raises:
            UnsafeError: it is elsewhere; who made the table could name any file.
            DataError: there is none.
        """
        name = picture.get("path") if isinstance(picture, dict) else None
        if not isinstance(name, str) or not name:
            raise DataError(f"{place}: {self.image}: holds no picture's bytes; embed them, or name another column")
        local = Path(self.path).expanduser().resolve()
        folder = local if local.is_dir() else local.parent
        file = Path(os.path.realpath(folder / name))
        if "://" in name or not local.exists() or not file.is_relative_to(folder):
            raise UnsafeError(f"{place}: {self.image}: {name!r} is not inside {folder}; embed the pictures' bytes")
        if not file.is_file():
            raise DataError(f"{place}: {self.image}: there is no file {file}; embed the pictures' bytes")
        return file


def _said(caption: Any, classes: Sequence[str] | None) -> Any:
    """What a row says, which may be the number of one of `classes`; -1 is none."""
    if classes is None or caption is None:
        return caption
    return classes[caption] if 0 <= caption < len(classes) else None


def split_of(name: str) -> str | None:
    """The split that a file's name tells, or a folder's in it, in the hub's words; None where it tells none.

    `data/NAME-00000-of-00002.parquet` is of the split NAME, whatever that is.
    """
    if shard := re.fullmatch(r"data/([\w.]+(?:-[\w.]+)*)-\d{5}-of-\d{5}.*", name):
        return shard[1]
    words = re.split(r"[-._ 0-9/]+", name)
    return next((split for word in words for split, said in SPLITS.items() if word in said), None)


SPEC: type[Source] = Dataset
