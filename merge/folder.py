"""A merge whose output is a folder: a plan for each file, and everything that is no weights copied.

Either it is laid out like the first model, a diffusers folder, or it holds one checkpoint in shards. Files larger than
`max_shard_size` are cut up, as other libraries do it: `NAME-00001-of-00003.safetensors` …, and an index.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge.content import root_of
from merge.execute import Result
from merge.output import lock, unfinished
from merge.plan import Entry, Plan
from merge.provenance import find
from merge.read import Files
from tuner.errors import ConfigError, UserError
from tuner.weights.folder import DiffusersFolder
from tuner.weights.store import SafetensorsFile, ShardedFile
from tuner.weights.views import Renamed
from tuner.weights.writer import atomic_write_text, resource_error

COPIED = {".json", ".txt", ".model", ".jinja"}
"""Endings of the files beside the weights that a pipeline reads: configs, vocabularies, schedulers."""
MAX_COPIED_BYTES = 100_000_000
MODELS = ("model_index.json", "model.safetensors.index.json", "model.safetensors")
"""A folder with one of these in it is a model, and may be replaced by another."""
JOURNAL = ".journal"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_of(text: str) -> int | None:
    """How many bytes `5GB` or `500 MiB` are; None for an empty text.

    Raises:
        ValueError: it is no size.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?i?B)", text.strip(), re.IGNORECASE)
    bytes_ = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if bytes_ <= 0:
        raise ValueError(f"{text!r} is no size; expected such as 5GB or 500MB")
    return bytes_


def pattern(plan: Plan, output: Path) -> DiffusersFolder | None:
    """The folder that the output is laid out like: the first model; None when that is no folder.

    Raises:
        ConfigError: the result is no whole pipeline.
    """
    model = plan.sources[0].store
    if not isinstance(model, DiffusersFolder):
        return None
    if lost := sorted(set(model.metas) - set(plan.metas)):
        raise ConfigError(f"output: {output}: a pipeline's folder needs all its parts, and {lost[0]} is left out")
    if extra := sorted(set(plan.metas) - set(model.metas)):
        raise ConfigError(f"output: {output}: {extra[0]} has no place in a folder like {plan.sources[0].name}")
    return model


@dataclass(frozen=True)
class Parts:
    """The files of the output."""

    plans: Mapping[str, Plan]
    """Of each file with weights, by its path in the folder."""
    indices: Mapping[str, str]
    """The texts of the indices of shards, by their paths in the folder."""
    model: DiffusersFolder | None
    """The folder whose other files are copied."""


def parts(plan: Plan, output: Path, limit: int | None) -> Parts:
    """The files that the folder `output` will hold, of at most `limit` bytes of weights each.

    Raises:
        ConfigError: nothing says how the folder is to be laid out, or the result is no whole pipeline.
    """
    model = pattern(plan, output)
    if model is None and limit is None:
        raise ConfigError(
            f"output: {output}: a folder can be written when the first model is a diffusers folder, or with "
            "max_shard_size; give a name that ends in .safetensors"
        )
    wholes = {"model": plan} if model is None else _components(plan, model)
    plans: dict[str, Plan] = {}
    indices: dict[str, str] = {}
    for stem, whole in wholes.items():
        shards = _shards(whole, limit)
        if len(shards) == 1:
            plans[f"{stem}.safetensors"] = shards[0]
            continue
        files = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        plans |= dict(zip(files, shards, strict=True))
        weight_map = {
            entry.called or entry.name: Path(file).name
            for file, shard in zip(files, shards, strict=True)
            for entry in shard.entries
        }
        content = {"metadata": {"total_size": whole.value_bytes}, "weight_map": weight_map}
        indices[_index(stem)] = json.dumps(content, indent=2, sort_keys=True) + "\n"
    return Parts(plans, indices, model)


def _components(plan: Plan, folder: DiffusersFolder) -> Mapping[str, Plan]:
    """The plan of each component, by the path of its file without the ending."""
    plans: dict[str, Plan] = {}
    for component, store in folder.components.items():
        called = {name: own for name in folder.metas for found, own in [folder.own_name(name)] if found is store}
        entries = [replace(entry, called=called[entry.name]) for entry in plan.entries if entry.name in called]
        plans[f"{component}/{_stem(store)}"] = replace(plan, entries=_placed(entries))
    return plans


def _stem(store: SafetensorsFile | ShardedFile) -> str:
    """What a component's file is called without the ending; of shards, what the whole would be called."""
    if isinstance(store, SafetensorsFile):
        return store.path.stem
    stem, _, index = store.index.name.partition(".safetensors")
    variant = index.removeprefix(".index").removesuffix("json").strip(".")  # diffusers says it there
    return f"{stem}.{variant}" if variant else stem


def _index(stem: str) -> str:
    """The path of the index of a file's shards, with the variant where diffusers looks for it."""
    path = Path(stem)
    name, _, variant = path.name.partition(".")
    return str(path.with_name(f"{name}.safetensors.index{f'.{variant}' if variant else ''}.json"))


def _shards(plan: Plan, limit: int | None) -> list[Plan]:
    """A plan cut into such of at most `limit` bytes, or of a single tensor; a weight and its scale stay together."""
    if limit is None or plan.value_bytes <= limit:
        return [plan]
    scales = {entry.scale_of: entry for entry in plan.entries if entry.scale_of is not None}
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in plan.entries:
        if entry.scale_of is not None:
            continue
        together = [entry, *([scales[entry.name]] if entry.name in scales else [])]
        numbers = sum(each.meta.bytes for each in together)
        if shards[-1] and filled + numbers > limit:
            shards.append([])
            filled = 0
        shards[-1] += together
        filled += numbers
    return [replace(plan, entries=_placed(shard)) for shard in shards]


def _placed(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Entries as they lie in a file of their own."""
    placed: list[Entry] = []
    offset = 0
    for entry in sorted(entries, key=lambda entry: -entry.meta.dtype.itemsize):
        placed.append(replace(entry, offset=offset))
        offset += entry.meta.bytes
    return tuple(placed)


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


class Finished:
    """Which files of an unfinished folder are whole, told by a journal in it."""

    def __init__(self, aside: Path, key: str, *, resume: bool) -> None:
        """`key` names what is being made; see `key_of`.

        Raises:
            ConfigError: `resume`, and what there is to go on with is something else.
        """
        self._path = aside / JOURNAL
        self._key = key
        self._results: dict[str, Result] = {}
        if not resume:
            return
        try:
            content = json.loads(self._path.read_text("utf-8"))
            own = content["key"] == key
            for file, (root, sources) in content["files"].items() if own else ():
                self._results[str(file)] = Result(str(root), tuple(map(str, sources)), 0)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        if not own:
            raise ConfigError(f"{self._path}: is of another merge, or an input has changed; merge without --resume")

    def __contains__(self, file: str) -> bool:
        return file in self._results

    def add(self, file: str, result: Result) -> None:
        """Note that a file is whole, and on the disk."""
        self._results[file] = result
        files = {name: [result.root, result.source_roots] for name, result in self._results.items()}
        atomic_write_text(self._path, json.dumps({"key": self._key, "files": files}))

    def result(self, file: str, plan: Plan) -> Result | None:
        """What a finished file is; None when it is not there, or not what was written any more."""
        known = self._results.get(file)
        if known is None:
            return None
        store = SafetensorsFile(self._path.parent / file)
        try:
            ancestry = find(store.metadata)
            names = {entry.name: entry.called or entry.name for entry in plan.entries}
            same = set(store.metas) == set(names.values()) and root_of(Renamed(store, names), names) == known.root
        except (UserError, OSError):
            return None
        if not same or ancestry is None or ancestry.root != known.root:
            return None
        return replace(known, resumed_bytes=plan.value_bytes)

    def remove(self) -> None:
        """Remove the journal: the folder is whole."""
        self._path.unlink(missing_ok=True)


def key_of(recipe: Mapping[str, object], plan: Plan) -> str:
    """Names what a folder is made of and how, and in which state the inputs are."""
    files = Files(plan.sources)
    files.close()
    text = json.dumps(recipe, sort_keys=True) + "".join(f"{path} {known}\n" for path, known in files.identities.items())
    return hashlib.sha256(text.encode()).hexdigest()


def clear(aside: Path, files: Collection[str], finished: Collection[str]) -> None:
    """Remove what an interrupted merge has left in `aside`, but for what of `files` can be gone on with."""
    kept = {aside / JOURNAL, *(aside / file for file in finished)}
    kept |= {path for file in files for path in unfinished(aside / file)}
    for path in sorted(aside.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # what is kept is in it
                path.rmdir()
        elif path not in kept:
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
