"""Any checkpoint as one safetensors file or as a diffusers folder, in a stream.

Numbers stay as they are or are cast, names stay or change. What weights do not say is said beside them (`facts`): in a
folder's scheduler, in marks in a file of Stable Diffusion XL, and in a `.yaml` beside one of Stable Diffusion 1 or 2.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from tuner.errors import ConfigError, DataError
from tuner.weights import published
from tuner.weights.adapters.peft_config import is_peft_folder
from tuner.weights.architecture import FOLDERS, MARKS, Architecture, identify
from tuner.weights.beside import Beside
from tuner.weights.checkpoint import is_pickled, open_files, open_store
from tuner.weights.config_beside import refuse_contradicting, settle
from tuner.weights.facts import PREDICTION, Facts
from tuner.weights.folder import DiffusersFolder
from tuner.weights.fp8 import QUANTIZATION, Scaled
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.layouts.ldm import OPEN_CLIP_2, averaged, from_diffusers, text_encoder, to_diffusers
from tuner.weights.modelspec import implementation
from tuner.weights.pickles import PickledFile
from tuner.weights.store import Location, SafetensorsFile, TensorMeta, TensorStore, quote, read_location
from tuner.weights.views import Assembled, Extended, Joined, Renamed
from tuner.weights.writer import (
    file_header,
    file_order,
    raw_bytes,
    whole_file,
    whole_folder,
)

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
"""What floating-point tensors may be cast to."""
Layout = Literal["ldm", "diffusers"]
CHUNK = 1 << 22
"""Numbers that are read and cast at a time."""
FILES = (".safetensors", ".sft")
OTHER_FILES = (".ckpt", ".pt", ".pth", ".bin", ".json", ".gguf", ".yaml")
"""Endings that no folder has."""
DENOISERS = ("unet", "transformer")
NETWORKS = (*DENOISERS, "vae", "vqvae")
"""Components of diffusers' own; the others are of transformers."""
GUESSED_DEPTH = ("depth_model.", "depth_estimator.")
DEPTH = (
    "The network that guesses depth has other names in the other layout, and is left out: copy depth_estimator/ from "
    "Intel/dpt-hybrid-midas, or depth_model.… from 512-depth-ema."
)

LAST_LAYER_GONE = (
    "The text encoder's last layer and its projection, which nothing reads, are in single files only: a file made of "
    "this folder has stand-ins for them, so keep the original if it is to come back bit for bit."
)
LAST_LAYER_MADE_UP = (
    "The text encoder's last layer and its projection, which nothing reads, are in no folder: the file has stand-ins, "
    "as sd-scripts writes them, the layer before and ones."
)


@dataclass(frozen=True)
class Converted:
    """What was done."""

    target: Path
    tensors: int
    bytes: int
    architecture: str
    dropped: int
    """Entries of a pickled checkpoint that are no tensors."""
    left_out: int
    """Tensors that the new layout has no place for, such as averages and schedules of training."""
    notes: tuple[str, ...] = ()
    """What else there is to know, a sentence each."""

    def __str__(self) -> str:
        notes = [f"what is no tensor ({self.dropped} entries)"] if self.dropped else []
        notes += [f"what has no place there ({self.left_out} tensors)"] if self.left_out else []
        left_out = f"; left out: {', '.join(notes)}" if notes else ""
        done = f"{self.target}: {self.tensors} tensors of {self.architecture}, {self.bytes / 1e6:,.1f} MB{left_out}"
        return "\n".join([done, *self.notes])


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    layout: Layout | None = None,
    variant: str | None = None,
    config: str | None = None,
    add: Sequence[Path] = (),
    ema: bool = False,
    whole: bool = False,
    overwrite: bool = False,
    dry: bool = False,
    progress: Callable[[int, int], None] = lambda written, total: None,
) -> Converted:
    """Write the tensors of `source` into the safetensors file or the diffusers folder `target`, whole or not at all.

    Weights with scales beside them (see `fp8`) stay as they are when nothing changes, else they are what they mean.

    Args:
        source: a safetensors or pickled file, the index of shards, or a diffusers folder.
        target: the file to write; a folder where its name has no ending of a file.
        dtype: one of `DTYPES` for the floating-point tensors; None keeps theirs.
        layout: whose names the tensors get, `ldm` (the original single files') or `diffusers`; None keeps theirs, and
            in a folder they are diffusers'.
        variant: which files of a diffusers folder to take.
        config: whose configs a folder gets: the name of a released model (`tuner.weights.published`) or a folder; None
            takes those of `source`, or of the released model that it has the tensors of.
        add: files or folders of components that `source` lacks: text encoders, an autoencoder.
        ema: take the averages over the training that a single file holds, `model_ema.…`, instead of the weights.
        whole: refuse to make a folder that lacks a network which pictures cannot be made without.
        overwrite: whether what is at `target` may be replaced.
        dry: write nothing; what headers tell to be wrong is refused all the same.
        progress: told the bytes written so far, and how many it will be.

    Raises:
        ConfigError: `target` is a file of `source`, is there already, or has another ending.
        DataError: `source` is no checkpoint, or no whole one, or a number is too large for `dtype`.
        UnsafeError: `source` would run code, or leads out of its folder.
        ResourceError: the disk is full, or a place cannot be read or written.
    """
    source = source.expanduser()
    as_folder = target.suffix.lower() not in (*FILES, *OTHER_FILES)
    _check_wishes(target, as_folder, layout, config)
    given = open_any(source, variant, as_meant=bool(dtype or layout or as_folder or add))
    if not dry:
        _check_target(target, {source: given}, overwrite)
    if is_peft_folder(source):
        raise DataError(
            f"{source}: a LoRA of peft's, whose config a file cannot hold; use 'tuner translate lora={source} "
            "output=… dialect=kohya', which gives it the names that most programs read"
        )
    try:
        store = Renamed(given, averaged(given.metas)) if ema else given
        store = _with_components(store, add, target, overwrite) if add else store
        made, left_out = _laid_out(store, "diffusers" if as_folder else layout or ("ldm" if add else None))
        stand_ins = isinstance(made, Extended) and any(name.startswith(OPEN_CLIP_2) for name in made.more)
        facts = Facts.of(source, given, made)
        made = made if as_folder else facts.marked(made)
        metas = {name: _cast(meta, dtype) for name, meta in made.metas.items()}
        job = _Job(source, given, made, metas, facts, progress)
        if any(name.startswith(GUESSED_DEPTH) for name in left_out):
            job.notes.append(DEPTH)
        if any(name.startswith(f"{OPEN_CLIP_2}transformer.") for name in left_out):
            job.notes.append(LAST_LAYER_GONE)
        if stand_ins:
            job.notes.append(LAST_LAYER_MADE_UP)
        if as_folder:
            parts, beside = _parts(job, config, whole)
            if not dry:
                _write_folder(job, target, parts, beside)
        elif not dry:
            refuse_contradicting(target, facts)
            _write_file(job, target)
    except DataError as error:
        raise DataError(str(error) if str(source) in str(error) else f"{source}: {error}") from error
    dropped = given.dropped if isinstance(given, PickledFile) else 0
    return Converted(target, len(metas), job.done, str(identify(metas)), dropped, len(left_out), tuple(job.notes))


@dataclass
class _Job:
    """A conversion on its way."""

    source: Path
    given: TensorStore
    """The source as it was opened."""
    store: TensorStore
    """With the names of the target."""
    metas: Mapping[str, TensorMeta]
    """Those of the target, cast."""
    facts: Facts
    progress: Callable[[int, int], None]
    notes: list[str] = field(default_factory=list[str])
    done: int = 0
    """Bytes written."""
    total: int = 0

    def put(self, file: BinaryIO, names: Mapping[str, str], texts: Mapping[str, str]) -> None:
        """Write a safetensors file that holds the tensors `names`, with what each is called in `store`."""
        metas = {name: self.metas[own] for name, own in names.items()}
        self.done += file.write(file_header(metas, texts))
        for name in file_order(metas):
            for values in _values(self.store, names[name]):
                self.done += file.write(raw_bytes(_rounded(values, metas[name].dtype, names[name], self.source)))
                self.progress(self.done, max(self.total, self.done))


def _write_file(job: _Job, target: Path) -> None:
    """One safetensors file; for Stable Diffusion 1 and 2 that predict velocity, what says so beside it."""
    facts = job.facts
    texts = dict(_metadata(job.given, "ldm" if facts.known.layout == "ldm" else "diffusers"))
    texts |= {PREDICTION: "v"} if facts.needs_yaml else {}
    job.total = len(file_header(job.metas, texts)) + sum(meta.bytes for meta in job.metas.values())
    with whole_file(target, job.total) as file:
        job.put(file, {name: name for name in job.metas}, texts)
    if beside := settle(target, facts):
        job.notes.append(beside)


def _parts(job: _Job, config: str | None, whole: bool) -> tuple[dict[str, dict[str, str]], Beside]:
    """What each component's tensors are called in its file and in the store, and what there is beside them.

    Raises:
        DataError: no released model is like it and no configs are given, or they do not fit; or it is not whole.
    """
    parts: dict[str, dict[str, str]] = {}
    for name in job.metas:
        component, _, own = name.partition(".")
        if name not in MARKS:
            parts.setdefault(component, {})[own] = name
    beside = _beside(job, config)
    if whole:
        beside.refuse_lacking(parts)
    beside.fit_components(parts)
    beside.fit_prediction(job.facts, chosen=config is not None)
    job.notes += beside.notes
    return parts, beside


def _write_folder(job: _Job, target: Path, parts: Mapping[str, Mapping[str, str]], beside: Beside) -> None:
    """A diffusers folder: a file of each component, and the configs and tokenizers of a whole pipeline."""
    job.total = sum(meta.bytes for meta in job.metas.values())
    with whole_folder(target) as folder:
        for path, content in beside.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        for component, names in parts.items():
            stem = "diffusion_pytorch_model" if component in NETWORKS else "model"
            (folder / component).mkdir(exist_ok=True)
            texts = dict(_said(job.given, "diffusers")) if component in DENOISERS else {}
            with whole_file(folder / component / f"{stem}.safetensors") as file:
                job.put(file, names, {**texts, "format": "pt"})


def _beside(job: _Job, config: str | None) -> Beside:
    """What the folder gets beside weights; released models' only where all tensors are theirs."""
    opened = job.given.store if isinstance(job.given, Scaled) else job.given
    if config is None and isinstance(opened, DiffusersFolder):
        return Beside.of_folder(job.source)
    name = config or job.facts.released
    if name is None:
        raise DataError(
            f"{job.facts.known}: no released model is like it (there are: {', '.join(published.variants())}); "
            "name one of them, or a folder whose configs fit, with --config"
        )
    if name in published.variants():
        published.check(name, {own: meta for own, meta in job.metas.items() if own not in MARKS})
    return Beside.chosen(name)


def _with_components(store: TensorStore, add: Sequence[Path], target: Path, overwrite: bool) -> TensorStore:
    """The store by canonical names, with the components of other files that it lacks.

    Raises:
        DataError: a file that adds nothing.
    """
    joined, _ = _laid_out(store, "diffusers")
    family = identify(joined.metas).family
    for path in add:
        given = open_any(path.expanduser())
        _check_target(target, {path.expanduser(): given}, overwrite)
        try:
            names = text_encoder(given.metas, family)
            other = Renamed(given, names) if names else _laid_out(given, "diffusers")[0]
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        have = {name.partition(".")[0] for name in joined.metas}
        more = {name: name for name in other.metas if name.partition(".")[0] not in {*have, *MARKS}}
        if not more:
            there = ", ".join(sorted({name.partition(".")[0] for name in other.metas}))
            raise DataError(f"{path}: adds nothing, as {there or 'nothing'} is there already; leave it out")
        joined = Joined(joined, Renamed(other, more))
    return joined


def open_any(source: Path, variant: str | None = None, as_meant: bool = True) -> TensorStore:
    """The tensors at `source`, also those of a pickle, which is read in a way that runs nothing in it.

    Args:
        source: a file or folder.
        variant: which files of a diffusers folder to take.
        as_meant: whether the scales of 8-bit weights are applied.

    Raises:
        UserError: as `open_store` does; or a pickle that holds more than tensors in plain containers.
    """
    if source.is_file() and is_pickled(source):
        return PickledFile(source)
    return open_store(source, variant) if as_meant else open_files(source, variant)


def _laid_out(store: TensorStore, layout: Layout | None) -> tuple[TensorStore, tuple[str, ...]]:
    """The store with the names of `layout`, and the tensors that it leaves out."""
    known = identify(store.metas)
    if layout is None or (known.layout == layout and layout == "ldm"):
        return store, ()
    if known.layout == layout and known.lora is False:
        names: dict[str, str] = {}
        for name in store.metas:
            if (other := names.setdefault(_whole_name(known, name), name)) != name:
                raise DataError(f"{quote(other)} and {quote(name)}: one tensor by two names; keep one")
        return Renamed(store, names), ()
    translation = {"ldm": from_diffusers, "diffusers": to_diffusers}[layout](store.metas)
    made = translation.of(store)
    _ = made.metas
    return made, translation.left_out


def lacking(store: TensorStore) -> str | None:
    """What a checkpoint of a released model's sizes lacks of its components; None where nothing is known to be missing.

    Raises:
        DataError: a name that no such network has.
    """
    known = identify(store.metas)
    variant = "sd2" if known.family == "sd2" and known.channels == 4 else known.variant
    if variant is None:
        return None
    return published.lacking(variant, _laid_out(store, "diffusers")[0].metas)


def _whole_name(known: Architecture, name: str) -> str:
    """The canonical name of a tensor that diffusers calls `name`, with its component in front."""
    component, _, own = name.partition(".")
    if component in FOLDERS:
        return canonical(component, own)
    alone = known.component(name)
    return name if alone is None or name in MARKS else canonical(alone, name)


def _check_wishes(target: Path, as_folder: bool, layout: Layout | None, config: str | None) -> None:
    if target.suffix.lower() in OTHER_FILES:
        raise ConfigError(f"{target}: a safetensors file is written; let its name end in .safetensors")
    if as_folder and layout == "ldm":
        raise ConfigError(f"{target}: a folder has diffusers' names; let the name of a single file end in .safetensors")
    if config is not None and not as_folder:
        raise ConfigError(f"{target}: a file has no configs; leave --config out, or give the name of a folder")


def _check_target(target: Path, sources: Mapping[Path, TensorStore], overwrite: bool) -> None:
    if not target.exists():
        return
    for source, store in sources.items():
        places = {place.path for name in store.metas if (place := store.locate(name))}
        for path in [source, *sorted(places)]:
            if path.samefile(target) or (target.is_dir() and path.resolve().is_relative_to(target.resolve())):
                raise ConfigError(f"{target}: is read from ({path}); choose another name to write to")
    if not overwrite and (target.is_file() or (target.is_dir() and any(target.iterdir()))):
        raise ConfigError(f"{target}: is there already; choose another name, or say --overwrite")
    if target.is_dir() and any(target.iterdir()) and not (target / "model_index.json").is_file():
        raise ConfigError(f"{target}: is there already, and is no model's folder; choose another name")


def _cast(meta: TensorMeta, dtype: str | None) -> TensorMeta:
    return TensorMeta(meta.shape, DTYPES[dtype]) if dtype and meta.dtype.is_floating_point else meta


def _metadata(store: TensorStore, layout: Layout = "diffusers") -> Mapping[str, str]:
    """The texts of a single file's header that are still true: hashes are not, nor scales that have been applied."""
    if isinstance(store, Scaled) and isinstance(store.store, SafetensorsFile):
        return {key: text for key, text in _metadata(store.store).items() if key != QUANTIZATION}
    if isinstance(store, SafetensorsFile):
        return {key: text for key, text in store.metadata.items() if "hash" not in key}
    return {**_said(store, layout), "format": "pt"}


def _said(store: TensorStore, layout: Layout) -> Mapping[str, str]:
    """What the header of a single file, or of a folder's denoiser, says about the model, for one in `layout`."""
    store = store.store if isinstance(store, Scaled) else store
    if isinstance(store, DiffusersFolder):
        store = next((store.components[name] for name in DENOISERS if name in store.components), store)
    if not isinstance(store, SafetensorsFile):
        return {}
    said = {key: text for key, text in _metadata(store).items() if key.startswith("modelspec.") and key != PREDICTION}
    if architecture := said.get("modelspec.architecture"):
        said["modelspec.implementation"] = implementation(
            architecture, "diffusers" if layout == "diffusers" else "comfy"
        )
    return said


def _values(store: TensorStore, name: str) -> Iterator[Tensor]:
    """The numbers of a tensor, flat, some at a time; where they are computed, as many as there are."""
    places = _places(store, name)
    if places is None:
        yield store.read(name).reshape(-1)
        return
    for place in places:
        dtype, size = place.meta.dtype, place.meta.dtype.itemsize
        elements = place.meta.bytes // size
        for start in range(0, elements, CHUNK):
            run = TensorMeta((min(CHUNK, elements - start),), dtype)
            yield read_location(replace(place, offset=place.offset + start * size, meta=run), name)


def _places(store: TensorStore, name: str) -> list[Location] | None:
    """Where the numbers of a tensor lie in files, one run after another; None where they are computed."""
    match store:
        case Extended() if name not in store.more:
            return _places(store.store, name)
        case Joined():
            return _places(store.holder(name), name)
        case Renamed():
            return _places(store.store, store.names[name])
        case Assembled():
            return store.places(name)
        case _:
            place = store.locate(name)
            return None if place is None else [place]


def _rounded(values: Tensor, dtype: torch.dtype, name: str, source: Path) -> Tensor:
    """`values` in `dtype`.

    Raises:
        DataError: a number that was finite is not any more.
    """
    if values.dtype == dtype:
        return values
    wide = values.float() if values.dtype.itemsize == 1 else values
    info = torch.finfo(dtype)
    largest = info.max + info.eps / 2 * 2 ** math.floor(math.log2(info.max))  # from here on it does not round to max
    lost = int((wide.isfinite() & (wide.abs() >= largest)).sum())
    if lost:
        raise DataError(f"{source}: {quote(name)}: {lost} numbers are too large for {dtype}; choose bfloat16")
    return wide.to(dtype)
