"""What of an interrupted merge is already on the disk.

The journal lies beside the unfinished output and is replaced as a whole, always after the values that it speaks of have
been brought to the disk. So what it calls finished is finished, whenever the process or the machine died.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.weights.writer import sync_folder

VERSION = 1


@dataclass(frozen=True)
class Journal:
    """The state of an unfinished merge."""

    key: str
    """Names the plan and its inputs; another merge may not go on from here."""
    done: Sequence[int]
    """Numbers of the finished blocks."""
    digests: Mapping[str, str]
    """Cells' digests of each tensor read or written so far, in hexadecimal, by `source/name`."""

    def save(self, path: Path) -> None:
        """Replace the journal at `path`."""
        content = {"version": VERSION, "key": self.key, "done": list(self.done), "digests": dict(self.digests)}
        new = unsaved(path)
        with new.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        sync_folder(path.parent)

    @staticmethod
    def load(path: Path) -> "Journal | None":
        """The journal at `path`; None when there is none, or not one of this form."""
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["version"] != VERSION:
                return None
            return Journal(content["key"], content["done"], content["digests"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def unsaved(path: Path) -> Path:
    """Where the next journal is written before it replaces the one at `path`."""
    return path.with_name(f"{path.name}.new")
