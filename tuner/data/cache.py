"""Results of encoders on disk, addressed by a hash of everything they depend on, so that none can be stale.

Entries may be shared by any number of runs: each is written under another name and renamed, and one that is not whole
counts as absent.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuner.errors import DataError, ResourceError
from tuner.weights.single_file import default_folder as default_folder
from tuner.weights.writer import raw_bytes, resource_error

VERSION = 3
"""Goes into every address; raised when what an entry means changes."""


CHECKSUM = "xxh3"
"""In an entry's header, the hash of its values."""
TOUCHED = 24 * 3600
"""An entry that is asked for is marked as used, but not more often than every so many seconds."""


def address(**inputs: object) -> str:
    """The entry that belongs to `inputs`: everything its content depends on."""
    text = json.dumps({"version": VERSION, **inputs}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """A folder of entries, each a small safetensors file."""

    folder: Path
    read_only: bool = False
    """Whether nothing may be noted down in it, either: for who only looks."""

    def path(self, key: str) -> Path:
        """Where the entry `key` is."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether the entry is there and whole."""
        try:
            with safe_open(self.path(key), framework="pt") as file:  # checks the header against the file's size
                found = bool(file.keys())
            if found and time.time() - self.path(key).stat().st_mtime > TOUCHED:
                with suppress(OSError):  # another's cache may be read only
                    os.utime(self.path(key))
            return found
        except (OSError, SafetensorError):
            return False

    def read(self, key: str) -> dict[str, Tensor]:
        """The entry `key`, which is there.

        Raises:
            DataError: it is not, any more.
        """
        try:
            return safetensors.torch.load(self.path(key).read_bytes())
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"run.cache: {self.path(key)}: gone or damaged since the run began; start it again, it is made anew"
            ) from error

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Put the entry `key` there.

        Raises:
            ResourceError: the disk is full or the folder cannot be written.
        """
        path = self.path(key)
        values = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = safetensors.torch.save(values, {CHECKSUM: checksum(values)})
        partial = path.with_suffix(f".tmp-{uuid.uuid4().hex}")  # also other machines may be writing this entry
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise ResourceError(f"run.cache: {resource_error(path, error, len(data))}") from error


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """XXH3-128 of the names and values of contiguous tensors on the CPU."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(raw_bytes(tensors[name]))
    return digest.hexdigest()
