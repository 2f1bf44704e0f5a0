"""Writing files whole or not at all.

A file is written under a temporary name beside its place, brought to the disk, and only then renamed. Whatever goes
wrong before leaves what was there before, and nothing else.
"""

import ctypes
import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from tuner.errors import DataError, DivergedError, ResourceError
from tuner.weights.store import DTYPE_NAMES, Header, TensorMeta

MAX_METADATA_BYTES = 1_000_000
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_HERE, _EXCHANGE = -100, 2
"""Linux' AT_FDCWD and RENAME_EXCHANGE."""


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` into the safetensors file `path`: the same bytes for the same values, whatever their order.

    Tensors lie in the order of dtype size (largest first, so that all are aligned), then name; metadata is sorted by
    key. One tensor at a time is copied from its device and checked. Dtypes are kept.

    Raises:
        DivergedError: a tensor holds NaN or infinity; the message names it.
        ResourceError: the disk is full or the place cannot be written; nothing is left behind.
    """
    header = file_header(_metas(tensors), metadata or {})
    size = len(header) + sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    with whole_file(path, size) as file:
        file.write(header)
        for name in file_order(tensors):
            values = tensors[name].detach().cpu()
            if not finite(values):
                raise DivergedError(f"{path}: {name}: holds NaN or infinity; not written, lower the learning rate")
            file.write(raw_bytes(values))


def chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes that `save_safetensors` writes: the header, then tensor by tensor."""
    yield file_header(_metas(tensors), metadata)
    for name in file_order(tensors):
        yield raw_bytes(tensors[name].detach().cpu())


def file_order(tensors: Mapping[str, Tensor] | Mapping[str, TensorMeta]) -> list[str]:
    """Names in the order in which their values lie in a file."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def header_of(header: Header, metadata: Mapping[str, str]) -> bytes:
    """The bytes before the values of the same file with other texts."""
    return _header(header.metas, metadata)


def file_header(metas: Mapping[str, TensorMeta], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the values of a file whose tensors lie in `file_order`."""
    return _header({name: metas[name] for name in file_order(metas)}, metadata)


def _header(metas: Mapping[str, TensorMeta], metadata: Mapping[str, str]) -> bytes:
    """The same of tensors that lie in the order of `metas`."""
    if sum(len(key) + len(value) for key, value in metadata.items()) > MAX_METADATA_BYTES:
        raise DataError(f"metadata of more than {MAX_METADATA_BYTES} bytes; shorten it")
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    for name, meta in metas.items():
        end = offset + meta.bytes
        header[name] = {"dtype": DTYPE_NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _metas(tensors: Mapping[str, Tensor]) -> dict[str, TensorMeta]:
    return {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if values.is_floating_point() and values.dtype.itemsize == 1:
        values = values.float()  # torch has no isfinite for 8-bit floats
    return bool(torch.isfinite(values).all())


def raw_bytes(values: Tensor) -> memoryview:
    """The values of a CPU tensor as they lie in a file."""
    raw = values.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)  # pyright: ignore[reportArgumentType] (arrays are buffers)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` into `path`, whole or not at all.

    Raises:
        ResourceError: the disk is full or the place cannot be written; nothing is left behind.
    """
    with whole_file(path, size=len(data)) as file:
        file.write(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 into `path`, whole or not at all; line ends stay as they are.

    Raises:
        ResourceError: the disk is full or the place cannot be written; nothing is left behind.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


@contextmanager
def whole_file(path: Path, size: int | None = None) -> Generator[BinaryIO]:
    """A file to write into that takes the name `path` when the block ends, and vanishes when it fails.

    A symbolic link at `path` is followed; permissions are those of any new file (0666 without the umask).

    Args:
        path: where the file goes; its folder must exist.
        size: bytes that will be written, for the message about a full disk.

    Raises:
        ResourceError: the disk is full or the place cannot be written; nothing is left behind.
    """
    place = Path(os.path.realpath(path))
    temporary = _temporary(place)
    try:
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder of that name exists", str(place))
        _remove_stumps(place)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(place)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(place.parent)
    except OSError as error:
        raise resource_error(path, error, size) from error


@contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """A folder to fill that takes the name `folder` when the block ends, in place of an older one, or vanishes.

    Raises:
        ResourceError: the disk is full or the place cannot be written.
    """
    aside = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_up(folder)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            take_place(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise resource_error(folder, error) from error


def take_place(aside: Path, folder: Path) -> None:
    """Bring the folder `aside` to the disk, and give it the name `folder`, in place of an older one.

    Whenever the process dies, the older one has the name, or the new one. Where the system cannot exchange two names
    there is a moment at which nothing has it; `clear_up` then gives it back.
    """
    for path in aside.rglob("*"):
        _sync(path)
    _sync(aside)
    old = folder.parent / f".old-{folder.name}-{os.getpid()}"
    if not folder.exists():
        aside.rename(folder)
    elif _exchange(aside, folder):
        aside.rename(old)
    else:
        folder.rename(old)
        aside.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Give two folders each other's name, in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:  # a C library from before 2018
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def clear_up(folder: Path) -> None:
    """Remove what processes that were killed while replacing `folder` left beside it, and put it back if it is gone."""
    for kind in (".old", ".tmp"):
        for left in folder.parent.glob(f"{kind}-{_escape(folder.name)}-*"):
            of_another = left.name.rpartition("-")[0] != f"{kind}-{folder.name}"  # whose name begins with this one's
            if of_another or not left.is_dir() or not _left_behind(left):
                continue
            if kind == ".old" and not folder.exists():
                left.rename(folder)
            else:
                shutil.rmtree(left)


def resource_error(path: Path, error: OSError, size: int | None = None) -> ResourceError:
    """`error`, met while writing `path`, in the words of a user; `size` is what was to be written, in bytes."""
    needed = f"needed {size} bytes, " if size is not None else ""
    if error.errno == errno.EFBIG:
        return ResourceError(
            f"{path}: larger than a file may be here: {needed}{_limit()}; raise that limit, or choose another disk"
        )
    if error.errno not in _NO_SPACE:
        return ResourceError(f"{path}: cannot be written: {error.strerror}; choose another output folder")
    free = shutil.disk_usage(_existing(Path(path))).free
    return ResourceError(f"{path}: disk is full: {needed}{free} bytes are free; free some space and repeat")


def _limit() -> str:
    """What keeps files small, for a message."""
    try:
        import resource
    except ImportError:
        return "more than the file system takes"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return "more than the file system takes"
    return f"and 'ulimit -f' allows this process {limit}"


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk; where folders cannot be synced, do nothing."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
    elif path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _temporary(place: Path) -> Path:
    return place.with_name(f".tmp-{place.name[:100]}-{os.getpid()}")


def _remove_stumps(place: Path) -> None:
    """Remove what processes that were killed while writing `place` left beside it."""
    for stump in place.parent.glob(f".tmp-{_escape(place.name[:100])}-*"):
        if _left_behind(stump) and stat.S_ISREG(stump.lstat().st_mode):
            stump.unlink(missing_ok=True)


def _left_behind(path: Path) -> bool:
    """Whether the process whose number ends the name is gone."""
    process = path.name.rpartition("-")[2]
    return process.isdecimal() and not _alive(int(process))


def _alive(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _escape(name: str) -> str:
    """`name` so that a glob pattern takes it literally."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next(folder for folder in path.resolve().parents if folder.is_dir())
