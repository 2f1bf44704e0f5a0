"""Pictures listed in a table: `metadata.jsonl` or a CSV file, a line each with the picture's file and its caption."""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuner.data.ahead import ahead
from tuner.data.captions import tidied
from tuner.data.example import Example, Size
from tuner.data.images import noted
from tuner.data.sources.base import NONE, Broken, Source, Wanted, left, refuse_other_size, size_of, whole
from tuner.data.sources.folder import find_pictures
from tuner.errors import DataError, UnsafeError, UserError

EXAMPLE = '{"file_name": "a.png", "text": "a cat"}'


@dataclass(frozen=True, kw_only=True)
class Table:
    """Every picture of a table, in its order."""

    path: Path
    """The file, `.jsonl` or `.csv`; pictures are looked for beside it."""
    image: str = "file_name"
    """The column of the picture's file, relative to the table's folder."""
    caption: str = "text"
    """The column of the caption; a list in it is alternatives, as lines of a caption file are. Where it is empty,
    pictures have none."""
    repeats: str | None = None
    """The column of how many times an epoch shows the picture; once, where left out."""
    weight: str | None = None
    """The column of what the picture's loss is multiplied by; 1, where left out."""
    mask: str | None = None
    """The column of the mask's file: white counts in the loss, black does not."""
    unlisted: str = "refuse"
    """What to do about pictures beside the table that it does not list: `refuse` or `ignore`."""

    def __post_init__(self) -> None:
        if self.unlisted not in ("refuse", "ignore"):
            raise ValueError(f"unlisted must be 'refuse' or 'ignore', got {self.unlisted!r}")
        if self.path.suffix.lower() not in (".jsonl", ".csv"):
            raise ValueError(f"path must be a .jsonl or .csv file, got {str(self.path)!r}")

    def wanted(self, base: str, contents: str | None) -> Sequence[Wanted]:
        return ()

    def uncaptioned(self) -> Source:
        return replace(self, caption="")

    def examples(self, unmade: Size | None = None) -> Sequence[Example]:
        return whole(*self.read(unmade))

    def read(self, unmade: Size | None = None, broken: Broken = NONE) -> tuple[Sequence[Example], Sequence[UserError]]:
        file = self.path.expanduser()
        examples: list[Example] = []
        wrong: list[UserError] = []
        listed: set[Path] = set()
        listing = list(rows(file))
        with closing(ahead(listing, lambda line: self._example(file.parent, *line, broken))) as read:
            for _, row in listing:
                if isinstance(row, dict):
                    listed |= {file.parent / str(row.get(column)) for column in (self.image, self.mask) if column}
                try:
                    examples.append(next(read)())
                except (DataError, UnsafeError) as error:
                    wrong.append(noted(error))
        if not examples and not wrong:
            raise DataError(f"{self.path}: lists no picture; give another table")
        if self.unlisted == "refuse":
            try:
                others = [picture for picture in find_pictures(file.parent) if picture not in listed]
            except DataError as error:
                wrong.append(error)
                others = []
            if others:
                wrong.append(
                    DataError(
                        f"{self.path}: {len(others)} pictures beside it are not listed, the first is "
                        f"{others[0].name}; list them, or set unlisted = 'ignore'"
                    )
                )
        return examples, left(examples, wrong)

    def _example(self, folder: Path, place: str, row: Mapping[str, Any] | DataError, broken: Broken) -> Example:
        if isinstance(row, DataError):
            raise row
        image = _file(folder, place, self.image, _value(row, self.image, place))
        size = size_of(image, broken)
        mask = None if self.mask is None else _file(folder, place, self.mask, _value(row, self.mask, place))
        if mask is not None:
            refuse_other_size(mask, size)
        said = _value(row, self.caption, place) if self.caption else ""
        each = said if isinstance(said, list) else str(said).splitlines() if _is_text(said) else [None]
        caption = tidied("\n".join(" ".join(str(line).split()) for line in each)) if all(map(_is_text, each)) else ""
        if self.caption and not caption:
            raise DataError(f"{place}: {self.caption}: is empty, or no text; write the picture's caption into it")
        return Example(
            image=image,
            size=size,
            caption=caption,
            mask=mask,
            repeats=1 if self.repeats is None else int(_number(row, self.repeats, place, whole=True)),
            weight=1.0 if self.weight is None else _number(row, self.weight, place),
        )


def rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Each row of a table, or what is wrong with it; and what to call it: file and line.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    if file.exists() and not file.is_file():  # such as a pipe, which would be waited for
        raise DataError(f"{file}: is no file; give another")
    try:
        with io.StringIO(file.read_bytes().decode().removeprefix("\ufeff"), newline="") as opened:
            if file.suffix.lower() == ".csv":
                reader = csv.DictReader(opened, strict=True)
                for row in reader:
                    place = f"{file}: line {reader.line_num}"
                    if None in row or None in row.values():
                        what = "has more or fewer columns than the first line; quote its commas"
                        yield place, DataError(f"{place}: {what}")
                    else:
                        yield place, row
                return
            for number, line in enumerate(opened, 1):
                if not line.strip():
                    continue
                place = f"{file}: line {number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    row = DataError(f"{place}: no JSON ({error}); a line is one object")
                if not isinstance(row, dict | DataError):
                    row = DataError(f"{place}: no JSON object; a line is like {EXAMPLE}")
                yield place, row
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{file}: no CSV ({error})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def _value(row: Mapping[str, Any], column: str, place: str) -> Any:
    if column in row and row[column] is None:
        raise DataError(f"{place}: {column}: is null; write what is meant, or remove the line")
    if column not in row:
        raise DataError(f"{place}: has no {column!r}, only {', '.join(map(repr, row))}; name the column in the config")
    return row[column]


def _is_text(said: Any) -> bool:
    return isinstance(said, str | int | float) and not isinstance(said, bool)


def _number(row: Mapping[str, Any], column: str, place: str, whole: bool = False) -> float:
    said = _value(row, column, place)
    try:
        number = float(said)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(said, bool) or not 0 < number < float("inf") or (whole and number != int(number)):
        kind = "a whole number above 0" if whole else "a number above 0"
        raise DataError(f"{place}: {column}: must be {kind}, got {said!r}")
    return number


def _file(folder: Path, place: str, column: str, said: Any) -> Path:
    """The file that a table names.

    Raises:
        UnsafeError: it lies outside the table's folder, or on the net.
        DataError: it is not there.
    """
    name = str(said)
    path = folder / name
    try:
        inside = Path(os.path.realpath(path)).is_relative_to(folder.resolve())
        there = path.is_file()
    except (OSError, ValueError):  # such as a name of thousands of letters, or with a NUL
        inside, there = True, False
    if "://" in name or Path(name).is_absolute() or not inside:
        raise UnsafeError(f"{place}: {column}: {name!r} is not inside {folder}; copy the picture there")
    if not there:
        shown = f"{name[:200]!r}{'...' * (len(name) > 200)}"
        raise DataError(f"{place}: {column}: there is no file {shown} in {folder}; remove the line, or put it there")
    return path


SPEC: type[Source] = Table
