"""A single file as a diffusers folder, for what reads folders only: made once, in a stream, and kept in the cache.

A folder belongs to a file at a place, of a size and with times that no program can set back: whatever is changed about
it, the folder is made anew. The older one stays until the cache is pruned, as a run may be using it.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tuner
from tuner.errors import DataError, ResourceError
from tuner.weights.architecture import identify
from tuner.weights.beside import Beside
from tuner.weights.convert import LAST_LAYER_GONE, convert, open_any
from tuner.weights.writer import atomic_write_text, resource_error

BASES = "bases"
"""The folder in a cache that holds these, a folder each."""
NOTES = "notes.txt"
"""In such a folder: what there was to say when it was made."""
OF_NO_USE = (LAST_LAYER_GONE,)
"""What there is to say only to who makes a single file of the folder again."""


def default_folder() -> Path:
    """`$TUNER_CACHE`, or the user's cache folder."""
    if folder := os.environ.get("TUNER_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuner"


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint in one file, safetensors or pickled, or in shards by their index."""

    path: Path
    add: tuple[Path, ...] = ()
    """Files of components that it lacks."""
    config: str | None = None
    """Whose configs the folder gets: a released model's name, or a folder; None where the tensors are to tell."""

    def check(self) -> None:
        """Refuse, from headers alone, what no whole folder can be made of.

        Raises:
            UserError: what is wrong with the file, or which component is in none of the files.
        """
        known = identify(open_any(self.path).metas)
        if known.lora:
            raise DataError(f"{self.path}: {known}, no base model; give the checkpoint that it is for")
        if known.family is None:
            raise DataError(f"{self.path}: {known}, no base model; give a whole checkpoint")
        _ = convert(self.path, Path("folder"), config=self.config, add=self.add, whole=True, dry=True)

    def kept(self, cache: Path) -> Path | None:
        """The folder, where it has been made already."""
        place = self._place(cache)
        if not (place / "model_index.json").is_file():
            return None
        with suppress(OSError):  # another's cache may be read only
            os.utime(place / "model_index.json")  # by which `tuner cache prune` knows what was used last
        return place

    def folder(self, cache: Path, say: Callable[[str], object]) -> Path:
        """The folder, made where it has to be, by one process while others wait.

        Args:
            cache: where it is kept.
            say: told what is being made, and what there is to know about it.

        Raises:
            UserError: see `check`.
            ResourceError: the disk is full, or the cache cannot be written.
        """
        place = self.kept(cache)
        if place is None:
            self.check()
            place = self._place(cache)
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.with_name(f"{place.name}.lock").open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if self.kept(cache) is None:
                        say(f"{self.path}: made into a folder, once: {place}")
                        made = convert(self.path, place, config=self.config, add=self.add, whole=True)
                        atomic_write_text(place / NOTES, "".join(f"{n}\n" for n in made.notes if n not in OF_NO_USE))
            except OSError as error:
                raise resource_error(place, error) from error
        with suppress(OSError):
            for note in (place / NOTES).read_text("utf-8").splitlines():
                say(f"{self.path}: {note}")
        return place

    def _place(self, cache: Path) -> Path:
        beside = None if self.config is None else Beside.chosen(self.config).files
        configs = None if beside is None else {name: hashlib.sha256(data).hexdigest() for name, data in beside.items()}
        files = [self.path, *self.add, self.path.with_suffix(".yaml")]  # the last may say what is predicted
        for index in [path for path in files if path.suffix == ".json"]:
            files += sorted(index.parent.glob("*.safetensors"))
        facts = [tuner.__version__, configs, *(_state(path) for path in files)]
        address = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return cache.absolute() / BASES / address[:32]


def _state(path: Path) -> list[str | int] | None:
    """By which a file is known to be the same; None where there is none."""
    try:
        known = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
    return [str(path.resolve()), known.st_ino, known.st_size, known.st_mtime_ns, known.st_ctime_ns]
