"""Pictures that come in archives and tables of bytes, laid out as files once, so that all that follows sees files.

A folder of them is named by what it came from. It counts when its list is written, which is last; until then every
picture that is there already is kept, so that a run that was stopped goes on.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tuner.data.cache import address, default_folder
from tuner.data.captions import tidied
from tuner.data.example import Example
from tuner.data.images import BrokenPicture, upright_size
from tuner.data.sources.base import NONE, Broken, size_of
from tuner.errors import DataError, UserError
from tuner.weights.writer import atomic_write_text, resource_error

LIST = "list.jsonl"
ENDINGS = {
    b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif",
}  # fmt: skip
"""Of files that begin so."""


@dataclass(frozen=True)
class Packed:
    """A picture as it lies in its archive."""

    place: str
    """Archive and place in it, for messages."""
    content: bytes = b""
    """The picture's file."""
    caption: str = ""
    """Lines of words; several are alternatives."""
    wrong: UserError | None = None
    """Why it cannot be had."""
    beside: Path | None = None
    """The file that it is in, where that is not the archive itself."""


def stamps(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What tells that files are still the same ones, without reading them: path, size and time of change."""
    found = [(file.resolve(), file.stat()) for file in files]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def unpack(
    identity: dict[str, object], what: str, packed: Callable[[], Iterator[Packed]], broken: Broken = NONE
) -> tuple[list[Example], list[UserError]]:
    """The pictures of an archive as examples, in their order; files are written where they are not there yet.

    And all that is wrong with the others, such as a picture that cannot be read or is one of `broken`, or has no
    caption.

    `identity` is all that decides what the archive holds; `what` names it to a person. Several processes may ask for
    one archive: one of them unpacks it, the others wait.

    Raises:
        DataError: it holds no picture.
        ResourceError: the disk is full.
    """
    folder = default_folder() / "pictures" / address(**identity)
    rows = _listed(folder)
    if rows is None:
        try:
            with _alone(folder):
                rows = _listed(folder)
                if rows is None:
                    return _write(folder, what, packed(), broken)
        except OSError as error:
            raise resource_error(folder, error) from error
    return _examples(folder, rows, broken)


def _listed(folder: Path) -> list[dict[str, Any]] | None:
    """The rows of a folder's list; None where there is none, or a file that a row names has changed since."""
    try:
        rows = [json.loads(line) for line in (folder / LIST).read_text(encoding="utf-8").splitlines()]
        beside = [row["beside"] for row in rows if "beside" in row]
        return rows if [*map(list, stamps([Path(path) for path, *_ in beside]))] == beside else None
    except FileNotFoundError:
        return None


def _examples(folder: Path, rows: Iterable[dict[str, Any]], broken: Broken) -> tuple[list[Example], list[UserError]]:
    """Of rows of the list; one without a size is a picture that could not be read."""
    examples: list[Example] = []
    wrong: list[UserError] = []
    for row in rows:
        file = folder / row["file"]
        place = row.get("place", str(file))
        try:
            size = size_of(file, broken) if "width" not in row or file in broken else (row["width"], row["height"])
            if not row["caption"]:
                raise DataError(f"{place}: its caption is empty, or no text; write one, or leave the picture out")
            examples.append(Example(image=file, size=size, caption=row["caption"]))
        except BrokenPicture as error:
            wrong.append(BrokenPicture(file, str(error).replace(str(file), place)))
        except DataError as error:
            wrong.append(DataError(str(error).replace(str(file), place)))
    return examples, wrong


def _write(folder: Path, what: str, packed: Iterator[Packed], broken: Broken) -> tuple[list[Example], list[UserError]]:
    """The list is written where nothing is wrong but that pictures cannot be decoded."""
    rows: list[dict[str, Any]] = []
    lost: list[UserError] = []
    for each in tqdm(packed, desc=f"unpacking {what}", unit=" pictures", leave=False):
        if each.wrong is not None:
            lost.append(each.wrong)
            continue
        digest = hashlib.sha256(each.content).hexdigest()
        file = folder / digest[:2] / f"{digest[:32]}{_ending(each.content)}"
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            partial = file.with_name(f".{file.name}")
            partial.write_bytes(each.content)
            partial.replace(file)
        row: dict[str, Any] = {
            "file": str(file.relative_to(folder)),
            "caption": tidied(each.caption),
            "place": each.place,
        }
        if each.beside is not None:
            row["beside"] = stamps([each.beside])[0]
        with suppress(DataError):  # it is said when the row is read
            row["width"], row["height"] = upright_size(file)
        rows.append(row)
    if not rows and not lost:
        raise DataError(f"{what}: holds no picture; give another")
    examples, wrong = _examples(folder, rows, broken)
    if not lost and all(isinstance(error, BrokenPicture) for error in wrong):
        atomic_write_text(folder / LIST, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return examples, [*lost, *wrong]


def _ending(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    if content[4:12] == b"ftypavif":
        return ".avif"
    return next((ending for start, ending in ENDINGS.items() if content.startswith(start)), ".unknown")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def weighed(examples: Sequence[Example], weight: float, repeats: int) -> list[Example]:
    """The same with a weight and repeats."""
    return [replace(example, weight=weight, repeats=repeats) for example in examples]
