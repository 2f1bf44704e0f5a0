"""A merge whose output is a diffusers folder: a plan for each component, and everything that is no weights copied."""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from merge.output import lock, unfinished
from merge.plan import Entry, Plan
from merge.recipe import Source
from tuner.errors import ConfigError
from tuner.weights.folder import DiffusersFolder
from tuner.weights.store import ShardedFile
from tuner.weights.writer import resource_error

COPIED = {".json", ".txt", ".model", ".jinja"}
"""Endings of the files beside the weights that a pipeline reads: configs, vocabularies, schedulers."""
MAX_COPIED_BYTES = 100_000_000


def pattern(plan: Plan, output: Path) -> DiffusersFolder:
    """The folder that the output is laid out like: the first model.

    Raises:
        ConfigError: the first model is no folder, or the result is no whole pipeline.
    """
    first = next((source for source in plan.sources if isinstance(source.store, DiffusersFolder)), None)
    if first is None or first is not _first(plan):
        raise ConfigError(
            f"output: {output}: a folder can be written when the first model is a diffusers folder; "
            "give a name that ends in .safetensors"
        )
    assert isinstance(first.store, DiffusersFolder)
    if lost := sorted(set(first.store.metas) - set(plan.metas)):
        raise ConfigError(f"output: {output}: a pipeline's folder needs all its parts, and {lost[0]} is left out")
    if extra := sorted(set(plan.metas) - set(first.store.metas)):
        raise ConfigError(f"output: {output}: {extra[0]} has no place in a folder like {first.name}")
    return first.store


def _first(plan: Plan) -> Source:
    return plan.sources[0]


def split(plan: Plan, folder: DiffusersFolder) -> Mapping[str, Plan]:
    """The plan of each file, by its path in the folder."""
    plans: dict[str, Plan] = {}
    for component, store in folder.components.items():
        own = {folder.own_name(name)[1]: name for name in folder.metas if folder.own_name(name)[0] is store}
        called = {name: short for short, name in own.items()}
        entries: list[Entry] = []
        offset = 0
        for entry in plan.entries:
            if entry.name in called:
                entries.append(replace(entry, offset=offset, called=called[entry.name]))
                offset += entry.meta.bytes
        file = store.index.name.split(".safetensors")[0] if isinstance(store, ShardedFile) else store.path.name
        file = file if file.endswith(".safetensors") else f"{file}.safetensors"
        plans[f"{component}/{file}"] = replace(plan, entries=tuple(entries))
    return plans


@contextlib.contextmanager
def workplace(place: Path, output: Path) -> Iterator[Path]:
    """The folder in which the one at `place` is put together, for this process alone.

    Raises:
        LockedError: another process is at work there.
        ResourceError: it cannot be made.
    """
    aside = place.with_name(f".{place.name}.part")
    try:
        aside.mkdir(exist_ok=True)
        descriptor = os.open(aside, os.O_RDONLY)
    except OSError as error:
        raise resource_error(output, error) from error
    try:
        lock(descriptor, output)
        yield aside
    finally:
        os.close(descriptor)


def clear(aside: Path, files: Collection[str]) -> None:
    """Remove what an interrupted merge has left in `aside`, but for what of `files` can be gone on with."""
    kept = {path for file in files for path in unfinished(aside / file)}
    for path in aside.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()


def copy_the_rest(folder: DiffusersFolder, target: Path) -> None:
    """Copy configs, vocabularies and the like, which are small and hold no weights, into `target`."""
    for path in sorted(folder.path.rglob("*")):
        place = path.relative_to(folder.path)
        hidden = any(part.startswith(".") for part in place.parts)
        wanted = path.suffix in COPIED and ".safetensors.index" not in path.name and len(place.parts) <= 2
        if path.is_file() and wanted and not hidden and path.stat().st_size <= MAX_COPIED_BYTES:
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / place)
