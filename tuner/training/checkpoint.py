"""Saving a run so that it can go on, and finding the newest save that is whole.

A checkpoint is a folder `samples-0000012800` of safetensors files and `state.json`, with a `manifest.json` of every
file's size and SHA-256. It is written under another name, synchronized to disk and renamed, so that it is whole or
not there; nothing in it is executable.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tuner.errors import CheckpointError
from tuner.weights.writer import atomic_write_text, save_safetensors, sync_folder


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One whole save."""

    folder: Path
    samples_seen: int

    def facts(self) -> dict[str, Any]:
        """What `state.json` says."""
        return json.loads((self.folder / "state.json").read_text(encoding="utf-8"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved as `name`, on the CPU."""
        return load_file(self.folder / f"{name}.safetensors")


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The saves of one run, under `folder`; the newest `keep` stay."""

    folder: Path
    keep: int = 2

    def save(self, samples_seen: int, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> Path:
        """Write a save whole or not at all, then delete those that are too old.

        Saves of a later place, which a run that went back to an earlier one has left behind, are deleted too: they
        are not of its course any more, and must not be taken for the newest.

        Raises:
            ResourceError: the disk is full; earlier saves are untouched.
            DivergedError: a tensor is not finite.
        """
        final = self.folder / f"samples-{samples_seen:010d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clean()
        partial = self.folder / f".tmp-{final.name}-{os.getpid()}"
        partial.mkdir()
        try:
            for name, named in tensors.items():
                save_safetensors(partial / f"{name}.safetensors", named, {})
            atomic_write_text(partial / "state.json", json.dumps(facts, indent=1, ensure_ascii=False))
            manifest = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
            atomic_write_text(partial / "manifest.json", json.dumps(manifest, indent=1))
            sync_folder(partial)
            if final.exists():  # a run that went back is here again; the old save counts until the new one does
                aside = final.with_name(f"{final.name}~")
                shutil.rmtree(aside, ignore_errors=True)
                final.rename(aside)
            partial.rename(final)
            sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._rotate(final)
        return final

    def _rotate(self, newest: Path) -> None:
        """Delete all but `newest` and those before it that count: what is not whole takes no other's place."""
        kept = 1
        for folder in reversed(self._named()):
            replaced = folder.name.endswith("~")
            if folder < newest and kept < self.keep and not replaced and _seems_whole(folder):
                kept += 1
            elif folder != newest:
                shutil.rmtree(folder)

    def clean(self) -> None:
        """Remove what killed writers left behind."""
        for stump in self.folder.glob(".tmp-*"):
            shutil.rmtree(stump, ignore_errors=True)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole save, and a line about each newer one that is not whole."""
        skipped: list[str] = []
        for folder in reversed(self._named()):
            try:
                return self.open(folder), skipped
            except CheckpointError as error:
                skipped.append(str(error))
        return None, skipped

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """The save in `folder`, every byte verified.

        Raises:
            CheckpointError: it is not whole; the message names the file.
        """
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            for name, expected in manifest.items():
                if Path(name).name != name or _fingerprint(folder / name) != expected:
                    raise CheckpointError(
                        f"{folder / name}: not what was saved; remove {folder.name} or resume another"
                    )
            if "state.json" not in manifest:
                raise CheckpointError(f"{folder}: its manifest names no state.json; remove it or resume another")
            samples_seen = int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["samples_seen"])
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{folder}: not a whole checkpoint ({error}); remove it or resume another") from error
        return Checkpoint(folder=folder, samples_seen=samples_seen)

    def _named(self) -> list[Path]:
        """Every folder named as a save, oldest first."""
        found = self.folder.glob("samples-*") if self.folder.is_dir() else ()
        return sorted(p for p in found if re.fullmatch(r"samples-\d{10}~?", p.name) and p.is_dir())


def _seems_whole(folder: Path) -> bool:
    """Whether every file has the size that was saved; what they hold is read when it is needed."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == expected["bytes"] for name, expected in manifest.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """A nest of dicts, lists and plain values as JSON and the tensors in it; the inverse of `unflatten`."""
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        match value:
            case Tensor():
                name = path if path not in tensors else f"{path}#{len(tensors)}"  # 1 and "1" are keys alike in text
                tensors[name] = value.detach()
                return {"tensor": name}
            case dict():
                return {
                    "items": [[key, visit(item, f"{path}.{key}" if path else str(key))] for key, item in value.items()]
                }
            case list() | tuple():
                items = [visit(item, f"{path}.{index}") for index, item in enumerate(value)]
                return {"list" if isinstance(value, list) else "tuple": items}
            case None | bool() | int() | float() | str():
                return value
            case _:
                raise TypeError(f"{path}: a {type(value).__name__} cannot be saved")

    return visit(state, ""), tensors


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nest that `flatten` took apart."""
    match value:
        case {"tensor": path}:
            return tensors[path]
        case {"items": items}:
            return {key: unflatten(item, tensors) for key, item in items}
        case {"list": items}:
            return [unflatten(item, tensors) for item in items]
        case {"tuple": items}:
            return tuple(unflatten(item, tensors) for item in items)
        case _:
            return value
