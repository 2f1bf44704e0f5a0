"""Any checkpoint as one safetensors file, in a stream: numbers stay as they are or are cast, names stay or change."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tuner.errors import ConfigError, DataError
from tuner.weights.architecture import identify
from tuner.weights.checkpoint import is_pickled, open_files, open_store
from tuner.weights.fp8 import QUANTIZATION, Scaled
from tuner.weights.layouts.ldm import from_diffusers, to_diffusers
from tuner.weights.pickles import PickledFile
from tuner.weights.store import SafetensorsFile, TensorMeta, TensorStore, quote, read_location
from tuner.weights.views import Assembled
from tuner.weights.writer import file_header, file_order, raw_bytes, whole_file

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
    """Tensors that the new layout has no name for, such as averages and schedules of training."""

    def __str__(self) -> str:
        notes = [f"{self.dropped} entries that are no tensors"] if self.dropped else []
        notes += [f"{self.left_out} tensors that only training needs"] if self.left_out else []
        left_out = f"; left out: {', '.join(notes)}" if notes else ""
        return f"{self.target}: {self.tensors} tensors of {self.architecture}, {self.bytes / 1e6:,.1f} MB{left_out}"


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    layout: Layout | None = None,
    variant: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda written, total: None,
) -> Converted:
    """Write the tensors of `source` into the safetensors file `target`, whole or not at all.

    Weights with scales beside them (see `fp8`) stay as they are when nothing changes, else they are what they mean.

    Args:
        source: a safetensors or pickled file, the index of shards, or a diffusers folder.
        target: the file to write.
        dtype: one of `DTYPES` for the floating-point tensors; None keeps theirs.
        layout: whose names the tensors get, `ldm` (the original single files') or `diffusers`; None keeps theirs.
        variant: which files of a diffusers folder to take.
        overwrite: whether a file at `target` may be replaced.
        progress: told the bytes written so far, and how many it will be.

    Raises:
        ConfigError: `target` is a file of `source`, is there already, or has another ending.
        DataError: `source` is no checkpoint, or a number is too large for `dtype`.
        UnsafeError: `source` would run code, or leads out of its folder.
        ResourceError: the disk is full, or a place cannot be read or written.
    """
    if target.suffix.lower() not in (".safetensors", ".sft"):
        raise ConfigError(f"{target}: a safetensors file is written; let its name end in .safetensors")
    given = _open(source, variant, as_meant=bool(dtype or layout))
    _check_target(target, source, given, overwrite)
    store, left_out = _laid_out(given, layout, source)
    metas = {name: _cast(meta, dtype) for name, meta in store.metas.items()}
    header = file_header(metas, _metadata(given))
    total = len(header) + sum(meta.bytes for meta in metas.values())
    with whole_file(target, total) as file:
        file.write(header)
        done = len(header)
        for name in file_order(metas):
            for values in _values(store, name):
                done += file.write(raw_bytes(_rounded(values, metas[name].dtype, name, source)))
                progress(done, total)
    dropped = given.dropped if isinstance(given, PickledFile) else 0
    return Converted(target, len(metas), total, str(identify(metas)), dropped, left_out)


def _open(source: Path, variant: str | None, as_meant: bool) -> TensorStore:
    source = source.expanduser()
    if source.is_file() and is_pickled(source):
        return PickledFile(source)
    return open_store(source, variant) if as_meant else open_files(source, variant)


def _laid_out(store: TensorStore, layout: Layout | None, source: Path) -> tuple[TensorStore, int]:
    """The store with the names of `layout`, and how many tensors it leaves out."""
    if layout is None or identify(store.metas).layout == layout:
        return store, 0
    translate = {"ldm": from_diffusers, "diffusers": to_diffusers}[layout]
    try:
        translation = translate(store.metas)
        view = Assembled(store, translation.pieces)
        _ = view.metas
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return view, len(translation.left_out)


def _check_target(target: Path, source: Path, store: TensorStore, overwrite: bool) -> None:
    if not target.exists():
        return
    places = {place.path for name in store.metas if (place := store.locate(name))}
    for path in [source.expanduser(), *sorted(places)]:
        if path.samefile(target):
            raise ConfigError(f"{target}: is read from ({path}); choose another name to write to")
    if target.is_file() and not overwrite:
        raise ConfigError(f"{target}: is there already; choose another name, or say --overwrite")


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
    place = store.locate(name)
    if place is None:
        yield store.read(name).reshape(-1)
        return
    dtype, size = place.meta.dtype, place.meta.dtype.itemsize
    elements = place.meta.bytes // size
    for start in range(0, elements, CHUNK):
        run = TensorMeta((min(CHUNK, elements - start),), dtype)
        yield read_location(replace(place, offset=place.offset + start * size, meta=run), name)


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
