"""A checkpoint by its path: what is there decides how it is read."""

from pathlib import Path

from tuner.errors import DataError, ResourceError
from tuner.weights.adapters.peft_config import ADAPTERS, FILE, PICKLED, is_peft_folder
from tuner.weights.folder import PICKLES, DiffusersFolder, component
from tuner.weights.fp8 import Scaled, has_scales
from tuner.weights.store import SafetensorsFile, ShardedFile, TensorStore, open_file, refuse_outside, refuse_pickle


def open_store(path: Path, variant: str | None = None) -> TensorStore:
    """The tensors at `path`, as they are meant: those of `open_files`, with the scales of 8-bit weights applied."""
    store = open_files(path, variant)
    if not has_scales(store):
        return store
    scaled = Scaled(store)
    try:
        _ = scaled.metas
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return scaled


def open_files(path: Path, variant: str | None = None) -> TensorStore:
    """The tensors at `path`: a `.safetensors` file, an index of shards, or a folder: diffusers', a component's, peft's.

    Headers are read and checked here, so that whatever is wrong with them is said now. A LoRA's file is a store like
    others.

    Args:
        path: a file or folder.
        variant: which files of a diffusers folder to take, such as `fp16`; None takes those of no variant.

    Raises:
        DataError: missing, damaged, or no checkpoint.
        UnsafeError: a pickle, or files that lie outside of their folder.
        ResourceError: it cannot be read.
    """
    try:
        store = _store(path.expanduser(), variant)
        _ = store.metas
    except OSError as error:
        raise ResourceError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
    return store


def is_pickled(path: Path) -> bool:
    """Whether the file is to be read as what torch saves, and not as safetensors, whatever its name."""
    with open_file(path) as file:
        start = file.read(9)
    return start.startswith(b"PK\x03\x04") or (path.suffix.lower() in PICKLES and start[8:9] != b"{")


def _store(path: Path, variant: str | None) -> TensorStore:
    if is_peft_folder(path):
        return _adapters(path)
    if path.is_dir():
        return component(path, variant) or DiffusersFolder(path, variant)
    if path.is_file() and is_pickled(path):
        refuse_pickle(path)
    if path.suffix.lower() == ".json" and path.is_file():
        if ".safetensors.index" not in path.name:
            raise DataError(f"{path}: no index of shards (….safetensors.index.json); give that, or the folder")
        return ShardedFile(path)
    return SafetensorsFile(path)


def _adapters(folder: Path) -> SafetensorsFile:
    """The file of adapters in a folder of peft's."""
    if (folder / ADAPTERS).is_file():
        refuse_outside(folder / ADAPTERS, folder)
        return SafetensorsFile(folder / ADAPTERS)
    if (folder / PICKLED).is_file():
        refuse_pickle(folder / PICKLED)
    raise DataError(f"{folder}: no {ADAPTERS} beside {FILE}; is the download complete?")
