"""Pictures that come in archives and tables of bytes, laid out as files once, so that all that follows sees files.

A folder of them is named by what it came from. It counts when its list is written, which is last; until then every
picture that is there already is kept, so that a run that was stopped goes on.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from tuner.data.cache import address, default_folder
from tuner.data.captions import tidied
from tuner.data.example import Example
from tuner.data.images import upright_size
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


def unpack(
    identity: dict[str, object], what: str, packed: Callable[[], Iterator[Packed]]
) -> tuple[list[Example], list[UserError]]:
    """The pictures of an archive as examples, in their order; files are written where they are not there yet.

    And all that is wrong with the others, such as a picture that cannot be read, or has no caption.

    `identity` is all that decides what the archive holds; `what` names it to a person. Several processes may ask for
    one archive: one of them unpacks it, the others wait.

    Raises:
        DataError: it holds no picture.
        ResourceError: the disk is full.
    """
    folder = default_folder() / "pictures" / address(**identity)
    listed = folder / LIST
    if not listed.is_file():
        try:
            with _alone(folder):
                if not listed.is_file():
                    return _write(folder, what, packed())
        except OSError as error:
            raise resource_error(folder, error) from error
    return [_example(folder, line) for line in listed.read_text(encoding="utf-8").splitlines()], []


def _example(folder: Path, line: str) -> Example:
    row = json.loads(line)
    return Example(image=folder / row["file"], size=(row["width"], row["height"]), caption=row["caption"])


def _write(folder: Path, what: str, packed: Iterator[Packed]) -> tuple[list[Example], list[UserError]]:
    """The list is written where nothing is wrong."""
    rows: list[str] = []
    wrong: list[UserError] = []
    for each in tqdm(packed, desc=f"unpacking {what}", unit=" pictures", leave=False):
        if each.wrong is not None:
            wrong.append(each.wrong)
            continue
        digest = hashlib.sha256(each.content).hexdigest()
        file = folder / digest[:2] / f"{digest[:32]}{_ending(each.content)}"
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            partial = file.with_name(f".{file.name}")
            partial.write_bytes(each.content)
            partial.replace(file)
        try:
            width, height = upright_size(file)
        except DataError as error:
            wrong.append(DataError(str(error).replace(str(file), each.place)))
            continue
        caption = tidied(each.caption)
        if not caption:
            message = f"{each.place}: its caption is empty, or no text; write one, or leave the picture out"
            wrong.append(DataError(message))
            continue
        row = {"file": str(file.relative_to(folder)), "width": width, "height": height, "caption": caption}
        rows.append(json.dumps(row, ensure_ascii=False))
    if not rows and not wrong:
        raise DataError(f"{what}: holds no picture; give another")
    if not wrong:
        atomic_write_text(folder / LIST, "\n".join(rows) + "\n")
    return [_example(folder, row) for row in rows], wrong


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
