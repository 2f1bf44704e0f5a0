"""Saving a run so that it can go on, and finding the newest save that is whole.

A checkpoint is a folder `samples-0000012800` of safetensors files and `state.json`, with a `manifest.json` of every
file's size and SHA-256. It is written under another name, synchronized to disk and renamed, so that it is whole or
not there; nothing in it is executable. The manifest says what was to be written, not what came to lie there, so a
fault on the way to the disk is noticed too.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tuner.errors import CheckpointError, DivergedError
from tuner.weights.writer import chunks, resource_error, sync_folder


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
            ResourceError: the disk is full or the folder cannot be written; earlier saves are untouched.
            DivergedError: a tensor is not finite.
        """
        final = self.folder / f"samples-{samples_seen:010d}"
        partial = self.folder / f".tmp-{final.name}-{os.getpid()}"
        for name, named in tensors.items():
            _refuse_non_finite(final / f"{name}.safetensors", named)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.clean()
            partial.mkdir()
            contents = {f"{name}.safetensors": chunks(named, {}) for name, named in tensors.items()}
            contents["state.json"] = iter([_json(facts)])
            with ThreadPoolExecutor(len(contents)) as writers:  # one reckons while another waits for the disk
                written = writers.map(_write, [partial / name for name in contents], contents.values())
            manifest = dict(zip(contents, written, strict=True))
            _write(partial / "manifest.json", iter([_json(manifest)]))
            sync_folder(partial)
            if final.exists():  # a run that went back is here again; the old save counts until the new one does
                aside = final.with_name(f"{final.name}~")
                shutil.rmtree(aside, ignore_errors=True)
                final.rename(aside)
            partial.rename(final)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            size = sum(t.numel() * t.dtype.itemsize for named in tensors.values() for t in named.values())
            raise resource_error(final, error, size) from error
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


def _refuse_non_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            extremes = torch.stack(tensor.detach().aminmax())  # of which one is NaN where any value is
            if not extremes.isfinite().all():
                raise DivergedError(f"{path}: {name}: holds NaN or infinity; not written, lower the learning rate")


def _write(path: Path, content: Iterator[bytes | memoryview]) -> dict[str, Any]:
    """Bring `content` to the disk as a new file; the answer is its size and SHA-256, reckoned while it is written."""
    digest = hashlib.sha256()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        for chunk in content:
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()


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
