"""Pictures and captions in tar files, as WebDataset lays them out: `000.jpg` and `000.txt` (or `000.json`) in turn."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path, PurePosixPath

from tuner.data.example import Example, Size
from tuner.data.images import SUFFIXES
from tuner.data.sources.base import NONE, Broken, Source, Wanted, left, whole
from tuner.data.unpacked import Packed, stamps, unpack, weighed
from tuner.errors import DataError, UserError


@dataclass(frozen=True, kw_only=True)
class WebDataset:
    """Every picture of some tar files; they are unpacked once, into the cache."""

    path: Path
    """A tar file, a folder of tar files, or a pattern such as `shards/*.tar`."""
    caption: str = "caption"
    """The field of a `.json` member that holds the caption, where there is no `.txt`."""
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
        return whole(*self.read(unmade))

    def read(self, unmade: Size | None = None, broken: Broken = NONE) -> tuple[Sequence[Example], Sequence[UserError]]:
        shards = self._shards()
        identity = {"shards": stamps(shards), "caption": self.caption, "kind": "webdataset"}
        found, wrong = unpack(
            identity, str(self.path), lambda: (p for shard in shards for p in self._read(shard)), broken
        )
        return weighed(found, self.weight, self.repeats), left(found, wrong)

    def _shards(self) -> list[Path]:
        path = self.path.expanduser()
        if path.is_dir():
            shards = sorted(path.rglob("*.tar"))
        elif has_magic(str(path)):
            shards = [Path(name) for name in sorted(glob(str(path), recursive=True))]  # noqa: PTH207
        else:
            shards = [path] if path.is_file() else []
        if not shards:
            raise DataError(f"{self.path}: no tar file there; give a file, a folder of them, or a pattern")
        return shards

    def _read(self, shard: Path) -> Iterator[Packed]:
        """The pictures of one file, read from front to end."""
        key = image = words = wrong = None
        try:
            with tarfile.open(shard, "r|*") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    place = PurePosixPath(member.name)
                    stem, _, ending = place.name.partition(".")
                    now = str(place.with_name(stem))
                    if now != key:
                        yield from self._whole(shard, key, image, words, wrong)
                        key, image, words, wrong = now, None, None, None
                    suffix = f".{ending.lower()}"
                    stream = archive.extractfile(member)
                    assert stream is not None
                    if suffix in SUFFIXES:
                        if image is not None:
                            wrong = DataError(f"{shard}: {member.name}: a second picture of that name; rename one")
                        image = stream.read()
                    elif suffix in (".txt", ".caption", ".json"):
                        try:
                            words = self._words(stream.read(), suffix) if suffix != ".json" or words is None else words
                        except (ValueError, RecursionError) as error:  # undecodable, or no JSON
                            wrong = DataError(f"{shard}: {member.name}: cannot be read ({error}); write it again")
                yield from self._whole(shard, key, image, words, wrong)
        except (tarfile.TarError, OSError, EOFError) as error:
            at = f"{shard}: {key or 'its start'}"
            yield Packed(at, wrong=DataError(f"{at}: cannot be read ({error}); make it again"))

    def _words(self, content: bytes, suffix: str) -> str | None:
        if suffix != ".json":
            return content.decode("utf-8-sig")
        said = json.loads(content)
        lines = said.get(self.caption) if isinstance(said, dict) else None
        return "\n".join(map(str, lines)) if isinstance(lines, list) else None if lines is None else str(lines)

    def _whole(
        self, shard: Path, key: str | None, image: bytes | None, words: str | None, wrong: UserError | None
    ) -> Iterator[Packed]:
        if key is None or (image is None and words is None and wrong is None):
            return
        if image is None and wrong is None:
            wrong = DataError(f"{shard}: {key}: has a caption and no picture; its members have to follow each other")
        yield Packed(f"{shard}: {key}", image or b"", words or "", wrong)


SPEC: type[Source] = WebDataset
