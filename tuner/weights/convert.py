"""Any checkpoint as one safetensors file or as a diffusers folder, in a stream.

Numbers stay as they are or are cast, names stay or change. What weights do not say is said beside them: that a model
predicts velocity is in a folder's scheduler, in marks in a file of Stable Diffusion XL, and in a `.yaml` beside one of
Stable Diffusion 1 or 2.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from tuner.errors import ConfigError, DataError
from tuner.weights import published
from tuner.weights.architecture import (
    FOLDERS,
    MARKS,
    TRANSFORMERS,
    V_PREDICTION,
    ZERO_TERMINAL_SNR,
    Architecture,
    identify,
)
from tuner.weights.checkpoint import is_pickled, open_files, open_store
from tuner.weights.folder import DiffusersFolder
from tuner.weights.fp8 import QUANTIZATION, Scaled
from tuner.weights.layouts.diffusers import canonical
from tuner.weights.layouts.ldm import averaged, from_diffusers, to_diffusers
from tuner.weights.pickles import PickledFile
from tuner.weights.store import Location, SafetensorsFile, TensorMeta, TensorStore, quote, read_location
from tuner.weights.views import Assembled, Extended, Renamed
from tuner.weights.writer import (
    atomic_write_bytes,
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
Prediction = Literal["epsilon", "v"]
CHUNK = 1 << 22
"""Numbers that are read and cast at a time."""
FILES = (".safetensors", ".sft")
OTHER_FILES = (".ckpt", ".pt", ".pth", ".bin", ".json", ".gguf", ".yaml")
"""Endings that no folder has."""
COPIED = (".json", ".txt", ".model", ".jinja")
"""Endings of the files in a folder that a pipeline reads beside weights: configs, vocabularies."""
MAX_COPIED_BYTES = 100_000_000
NETWORKS = ("unet", "transformer", "vae")
"""Components of diffusers' own; the others are of transformers."""
PREDICTION = "modelspec.prediction_type"
GUESSED_DEPTH = ("depth_model.", "depth_estimator.")
DEPTH = (
    "The network that guesses depth has other names in the other layout, and is left out: copy depth_estimator/ from "
    "Intel/dpt-hybrid-midas, or depth_model.… from 512-depth-ema."
)
SCHEDULER = "scheduler/scheduler_config.json"
V_NORMS = {
    "unet.up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias",
}
V_SPREAD = 0.09
"""Stable Diffusion 2 predicts velocity where the numbers of this layer spread more than that, as ComfyUI tells it."""


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
        notes = [f"{self.dropped} entries that are no tensors"] if self.dropped else []
        notes += [f"{self.left_out} tensors that have no place there"] if self.left_out else []
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
    ema: bool = False,
    overwrite: bool = False,
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
        ema: take the averages over the training that a single file holds, `model_ema.…`, instead of the weights.
        overwrite: whether what is at `target` may be replaced.
        progress: told the bytes written so far, and how many it will be.

    Raises:
        ConfigError: `target` is a file of `source`, is there already, or has another ending.
        DataError: `source` is no checkpoint, or no whole one, or a number is too large for `dtype`.
        UnsafeError: `source` would run code, or leads out of its folder.
        ResourceError: the disk is full, or a place cannot be read or written.
    """
    source = source.expanduser()
    as_folder = target.suffix.lower() not in (*FILES, *OTHER_FILES)
    if target.suffix.lower() in OTHER_FILES:
        raise ConfigError(f"{target}: a safetensors file is written; let its name end in .safetensors")
    if as_folder and layout == "ldm":
        raise ConfigError(f"{target}: a folder has diffusers' names; let the name of a single file end in .safetensors")
    if config is not None and not as_folder:
        raise ConfigError(f"{target}: a file has no configs; leave --config out, or give the name of a folder")
    given = _open(source, variant, as_meant=bool(dtype or layout or as_folder))
    dropped = given.dropped if isinstance(given, PickledFile) else 0
    _check_target(target, source, given, overwrite)
    try:
        store = Renamed(given, averaged(given.metas)) if ema else given
        wanted = "diffusers" if as_folder else layout
        made, left_out = _laid_out(store, wanted)
        notes = [DEPTH] if any(name.startswith(GUESSED_DEPTH) for name in left_out) else []
        facts = _facts(source, given, made)
        made = made if as_folder else _marked(made, facts)
        write = _write_folder if as_folder else _write_file
        metas = {name: _cast(meta, dtype) for name, meta in made.metas.items()}
        job = _Job(source, given, made, metas, facts, config, progress)
        notes += write(job, target)
    except DataError as error:
        raise DataError(str(error) if str(source) in str(error) else f"{source}: {error}") from error
    return Converted(target, len(metas), job.done, str(identify(metas)), dropped, len(left_out), tuple(notes))


@dataclass(frozen=True)
class Facts:
    """What of a checkpoint is not in its weights."""

    known: Architecture
    prediction: Prediction | None = None
    """What it says that it predicts; None when it says nothing."""
    zero_terminal_snr: bool = False
    guessed: bool = False
    """Whether the prediction is told from numbers, and not said."""


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
    config: str | None
    progress: Callable[[int, int], None]
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


def _write_file(job: _Job, target: Path) -> list[str]:
    """One safetensors file; for Stable Diffusion 1 and 2 that predict velocity, what says so beside it."""
    facts = job.facts
    unmarked = facts.prediction == "v" and facts.known.family in ("sd1", "sd2") and not facts.guessed
    texts = dict(_metadata(job.given)) | ({PREDICTION: "v"} if unmarked else {})
    job.total = len(file_header(job.metas, texts)) + sum(meta.bytes for meta in job.metas.values())
    with whole_file(target, job.total) as file:
        job.put(file, {name: name for name in job.metas}, texts)
    if not unmarked or facts.known.layout != "ldm":
        return []
    place = target.with_suffix(".yaml")
    atomic_write_bytes(place, published.original_config(str(facts.known.family)))
    return [f"It predicts velocity, which {place} tells user interfaces; keep it beside the file."]


def _write_folder(job: _Job, target: Path) -> list[str]:
    """A diffusers folder: a file of each component, and the configs and tokenizers of a whole pipeline.

    Raises:
        DataError: no released model is like it and no configs are given, or they do not fit.
    """
    files = _configs(job)
    notes: list[str] = []
    parts: dict[str, dict[str, str]] = {}
    for name in job.metas:
        component, _, own = name.partition(".")
        if name not in MARKS:
            parts.setdefault(component, {})[own] = name
    index = _adapted_index(files, parts, notes)
    _adapt_scheduler(files, job.facts, job.config, notes)
    contents = {path: published.to_json(content) for path, content in files.items() if isinstance(content, dict)}
    contents |= {path: content for path, content in files.items() if isinstance(content, bytes)}
    for component in parts:
        if index.get(component, [None, None]) == [None, None] or f"{component}/config.json" not in files:
            raise DataError(
                f"{component}: has no place in a folder of a {index['_class_name']}; choose another --config"
            )
    job.total = sum(meta.bytes for meta in job.metas.values())
    with whole_folder(target) as folder:
        for path, content in contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        for component, names in parts.items():
            stem = "diffusion_pytorch_model" if component in NETWORKS else "model"
            (folder / component).mkdir(exist_ok=True)
            with whole_file(folder / component / f"{stem}.safetensors") as file:
                job.put(file, names, {"format": "pt"})
    return notes


Files = dict[str, published.Json | bytes]


def _configs(job: _Job) -> Files:
    """What a folder has beside weights, by path: JSON objects, and other files as they are."""
    if job.config is not None and job.config not in published.variants():
        folder = Path(job.config).expanduser()
        if not folder.is_dir():
            published.configs(job.config)  # says which there are
        try:
            return _copied(folder)
        except DataError as error:
            raise ConfigError(f"--config: {error}") from error
    if job.config is None and isinstance(_as_opened(job.given), DiffusersFolder):
        return _copied(job.source)
    name = job.config or _variant(job.facts)
    if name is None:
        raise DataError(
            f"{job.facts.known}: no released model is like it (there are: {', '.join(published.variants())}); "
            "name one of them, or a folder whose configs fit, with --config"
        )
    published.check(name, {own: meta for own, meta in job.metas.items() if own not in MARKS})
    configs = published.configs(name)
    return {**configs, **published.tokenizers(configs)}


def _copied(folder: Path) -> Files:
    """The configs and small files of a diffusers folder."""
    files: Files = dict(published.read(folder))
    for path in sorted(folder.glob("*/*")):
        place = path.relative_to(folder).as_posix()
        wanted = path.suffix in COPIED and ".safetensors.index" not in path.name and not path.name.startswith(".")
        if place not in files and wanted and path.is_file() and path.stat().st_size <= MAX_COPIED_BYTES:
            files[place] = path.read_bytes()
    return files


def _variant(facts: Facts) -> str | None:
    """The released model whose configs fit."""
    known = facts.known
    if known.family == "sd2" and known.channels == 4:
        return "sd2" if facts.prediction == "v" else "sd2-base"
    return known.variant


def _adapted_index(files: Files, parts: Mapping[str, object], notes: list[str]) -> published.Json:
    """`model_index.json`, which says null of every component that is not there; their configs are taken out."""
    index = files["model_index.json"]
    assert isinstance(index, dict)
    lost: list[str] = []
    for part, names in list(index.items()):
        network = part in FOLDERS or part in ("safety_checker", "depth_estimator")
        if network and part not in parts and isinstance(names, list) and names != [None, None]:
            index[part] = [None, None]
            lost.append(part)
            for path in [path for path in files if path.startswith(f"{part}/")]:
                del files[path]
    if "safety_checker" in lost:
        index["requires_safety_checker"] = False
        lost.remove("safety_checker")
    if "depth_estimator" in index and index["depth_estimator"] == [None, None]:
        lost.append("depth_estimator")
    if lost:
        names = ", ".join(f"{part}=…" for part in lost)
        notes.append(f"Not in the source: {', '.join(lost)}; open the folder with from_pretrained(folder, {names}).")
    return index


def _adapt_scheduler(files: Files, facts: Facts, config: str | None, notes: list[str]) -> None:
    """Say in the scheduler's config what the source says that it predicts; a guess yields to `config`."""
    scheduler = files.get(SCHEDULER)
    if not isinstance(scheduler, dict) or facts.known.family in TRANSFORMERS or (facts.guessed and config is not None):
        return
    if facts.prediction == "v" and scheduler.get("prediction_type") != "v_prediction":
        scheduler["prediction_type"] = "v_prediction"
    if facts.prediction == "epsilon" and scheduler.get("prediction_type", "epsilon") != "epsilon":
        scheduler["prediction_type"] = "epsilon"
    if facts.zero_terminal_snr:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if facts.guessed and config is None:
        told = "velocity" if facts.prediction == "v" else "noise"
        notes.append(
            f"It seems to predict {told}, going by one layer's numbers; if pictures are grey or noise, name the other "
            f"with --config ({'sd2-base' if facts.prediction == 'v' else 'sd2'})."
        )


def _facts(source: Path, given: TensorStore, made: TensorStore) -> Facts:
    """What is known of the source beside its weights, said by marks, a scheduler, a header or a `.yaml`, in this order;
    of Stable Diffusion 2 it is told from its numbers where nothing says it."""
    known = identify(made.metas)
    if known.marks or known.family in (None, *TRANSFORMERS):
        return Facts(known, known.prediction, known.zero_terminal_snr)
    opened = _as_opened(given)
    if isinstance(opened, DiffusersFolder):
        scheduler = published.read_json(source / SCHEDULER) if (source / SCHEDULER).is_file() else {}
        predicted = "v" if scheduler.get("prediction_type") == "v_prediction" else "epsilon"
        return Facts(known, predicted, scheduler.get("rescale_betas_zero_snr") is True)
    said = _metadata(given).get(PREDICTION)
    beside = source.with_suffix(".yaml")
    if said is None and source.is_file() and beside.is_file() and beside.stat().st_size < 1_000_000:
        text = beside.read_text("utf-8", errors="replace")
        said = "v" if re.search(r"^\s*parameterization:\s*[\"']?v\b", text, re.MULTILINE) else "epsilon"
    if said is not None:
        return Facts(known, "v" if said in ("v", "v_prediction") else "epsilon")
    if known.family == "sd2" and known.channels == 4 and (norm := V_NORMS & made.metas.keys()):
        spread = float(made.read(norm.pop()).float().std(correction=0))
        return Facts(known, "v" if spread > V_SPREAD else "epsilon", guessed=True)
    return Facts(known)


def _marked(store: TensorStore, facts: Facts) -> TensorStore:
    """A single file of Stable Diffusion XL with the marks that say what its folder says."""
    known = facts.known
    if known.family != "sdxl" or known.layout != "ldm" or known.marks or facts.prediction != "v":
        return store
    marks = (V_PREDICTION, ZERO_TERMINAL_SNR) if facts.zero_terminal_snr else (V_PREDICTION,)
    return Extended(store, {mark: torch.zeros(0) for mark in marks})


def _as_opened(store: TensorStore) -> TensorStore:
    return store.store if isinstance(store, Scaled) else store


def _open(source: Path, variant: str | None, as_meant: bool) -> TensorStore:
    if source.is_file() and is_pickled(source):
        return PickledFile(source)
    return open_store(source, variant) if as_meant else open_files(source, variant)


def _laid_out(store: TensorStore, layout: Layout | None) -> tuple[TensorStore, tuple[str, ...]]:
    """The store with the names of `layout`, and the tensors that it leaves out."""
    known = identify(store.metas)
    if layout is None or (known.layout == layout and layout == "ldm"):
        return store, ()
    if known.layout == layout and known.lora is False:
        return Renamed(store, {_whole_name(known, name): name for name in store.metas}), ()
    translation = {"ldm": from_diffusers, "diffusers": to_diffusers}[layout](store.metas)
    made = translation.of(store)
    _ = made.metas
    return made, translation.left_out


def _whole_name(known: Architecture, name: str) -> str:
    """The canonical name of a tensor that diffusers calls `name`, with its component in front."""
    component, _, own = name.partition(".")
    if component in FOLDERS:
        return canonical(component, own)
    alone = known.component(name)
    return name if alone is None or name in MARKS else canonical(alone, name)


def _check_target(target: Path, source: Path, store: TensorStore, overwrite: bool) -> None:
    if not target.exists():
        return
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


def _metadata(store: TensorStore) -> Mapping[str, str]:
    """The texts of a single file's header that are still true: hashes are not, nor scales that have been applied."""
    if isinstance(store, Scaled) and isinstance(store.store, SafetensorsFile):
        return {key: text for key, text in _metadata(store.store).items() if key != QUANTIZATION}
    if isinstance(store, SafetensorsFile):
        return {key: text for key, text in store.metadata.items() if "hash" not in key}
    return {"format": "pt"}


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
