"""Checkpoints as torch saves them, `.ckpt`, `.pt`, `.pth` and `.bin`, read without unpickling anything.

Such a file is a zip archive: `data.pkl` says what there is, and each storage's numbers lie in `data/KEY` as they are.
The pickle is read by `opcodes`, which carries nothing out; the numbers are read from the archive where they lie. As no
code runs, and no memory is taken before its size is checked against the file's, it is done in this process: a process
of its own with a limit on memory would guard against nothing more.
"""

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Never

from torch import Tensor

from tuner.errors import DataError, UnsafeError
from tuner.weights.opcodes import MAX_BYTES, Table, TensorNote, Thing, read_pickle
from tuner.weights.store import DTYPE_NAMES, Location, TensorMeta, open_file, quote, read_location, refuse_other_formats

WRAPPERS = ("state_dict", "model", "module")
"""What trainers call the network's table among other things; the first that is there is taken."""
MAX_COPIES = 4
"""How often the file's size its tensors may fill together; tensors may share their numbers, but not without end."""
MAX_DIRECTORY = 4_000_000
"""Bytes of the archive's list of files: some 30,000 of them."""


@dataclass(frozen=True)
class _Contents:
    notes: Mapping[str, TensorNote]
    starts: Mapping[str, int]
    """Where each storage starts in the file."""
    file_bytes: int
    dropped: int


@dataclass(frozen=True)
class PickledFile:
    """A file that `torch.save` has written, as a store."""

    path: Path

    @cached_property
    def _contents(self) -> _Contents:
        with open_file(self.path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(512)
            if not start.startswith(b"PK\x03\x04"):
                _refuse(start, self.path)
            _check_directory(file, file_bytes, self.path)
            try:
                with zipfile.ZipFile(file) as archive:
                    return _read(archive, file_bytes, self.path)
            except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError) as error:
                raise DataError(f"{self.path}: a damaged archive ({error}); download it again") from error

    @cached_property
    def _metas(self) -> Mapping[str, TensorMeta]:
        return {name: TensorMeta(note.shape, note.dtype) for name, note in self._contents.notes.items()}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's name, shape and dtype.

        Raises:
            DataError: not a whole file of torch's, or one without a table of tensors.
            UnsafeError: the pickle names what no checkpoint has a use for.
        """
        return self._metas

    @property
    def dropped(self) -> int:
        """How many entries are no tensors of the network: epochs, optimizers, callbacks."""
        return self._contents.dropped

    def locate(self, name: str) -> Location | None:
        """Where the values of `name` lie; None when they are not row by row."""
        note = self._contents.notes[name]
        return self._span(note, self.metas[name]) if _row_by_row(note) else None

    def _span(self, note: TensorNote, meta: TensorMeta) -> Location:
        """The bytes from the tensor's first number on, as `meta`."""
        offset = self._contents.starts[note.storage.key] + note.offset * note.dtype.itemsize
        return Location(self.path, offset, meta, self._contents.file_bytes)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, freshly allocated on the CPU."""
        note = self._contents.notes[name]
        if _row_by_row(note):
            return read_location(self._span(note, self.metas[name]), name)
        used = TensorMeta((_last(note) + 1,), note.dtype)
        return read_location(self._span(note, used), name).as_strided(note.shape, note.stride).contiguous()


def _read(archive: zipfile.ZipFile, file_bytes: int, path: Path) -> _Contents:
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1 or len(entries) != len(archive.infolist()):
        raise DataError(f"{path}: a zip archive, but not one of torch's; check where it comes from")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise DataError(f"{path}: a TorchScript program, not a checkpoint; use the model's weights")
    order = entries.get(f"{root}byteorder")
    if order is not None and order.file_size < 16 and _bytes(archive, order, file_bytes, path) != b"little":
        raise DataError(f"{path}: written on a big-endian machine; save it again on another one")
    notes, dropped = _tensors(read_pickle(_bytes(archive, entries[pickles[0]], file_bytes, path), str(path)), path)
    starts: dict[str, int] = {}
    for name, note in notes.items():
        storage = note.storage
        info = entries.get(f"{root}data/{storage.key}")
        if info is None or info.file_size != storage.elements * storage.dtype.itemsize:
            raise DataError(f"{path}: {quote(name)}: its numbers are missing or of another size; download it again")
        if prod(note.shape) and (_last(note) + 1 + note.offset) * note.dtype.itemsize > info.file_size:
            raise DataError(f"{path}: {quote(name)}: reaches past the end of its numbers; download it again")
        if prod(note.shape) * note.dtype.itemsize > info.file_size:
            raise DataError(f"{path}: {quote(name)}: larger than the numbers that it is made of; do not use this file")
        if storage.key not in starts:
            starts[storage.key] = _start(archive, info, file_bytes, path)
    if sum(prod(note.shape) * note.dtype.itemsize for note in notes.values()) > MAX_COPIES * file_bytes:
        raise DataError(f"{path}: its tensors are more than {MAX_COPIES} times as large as the file; do not use it")
    return _Contents(notes, starts, file_bytes, dropped)


def _check_directory(file: BufferedReader, file_bytes: int, path: Path) -> None:
    """Refuse a list of files that would fill the memory; it is described by the last 22, or 98, bytes of the file."""
    file.seek(max(file_bytes - 98, 0))
    end = file.read(98)
    if end[-22:-18] != b"PK\x05\x06" or end[-2:] != b"\0\0":
        raise DataError(f"{path}: a damaged archive (its end is missing); download it again")
    large = end[-42:-38] == b"PK\x06\x07"
    if large and end[:4] != b"PK\x06\x06":
        raise DataError(f"{path}: a damaged archive (its end is not in order); download it again")
    size = int.from_bytes(end[40:48] if large else end[-10:-6], "little")
    if size > MAX_DIRECTORY:
        raise DataError(f"{path}: a list of files of {size} bytes, expected at most {MAX_DIRECTORY}; do not use it")


def _tensors(content: object, path: Path) -> tuple[dict[str, TensorNote], int]:
    """The table of tensors in what the pickle describes, and how much else there is."""
    dropped = 0
    if isinstance(content, Table):
        for wrapper in WRAPPERS:
            inner = content.entries.get(wrapper)
            if isinstance(inner, Table) and any(isinstance(value, TensorNote) for value in inner.entries.values()):
                dropped, content = len(content.entries) - 1 + content.others, inner
                break
    table = content if isinstance(content, Table) else Table()
    notes = {name: value for name, value in table.entries.items() if isinstance(value, TensorNote)}
    if not notes:
        found = f" (there are: {', '.join(map(quote, list(table.entries)[:5]))})" if table.entries else ""
        raise DataError(f"{path}: no table of tensors in it, such as 'state_dict'{found}; expected a checkpoint")
    for name, value in table.entries.items():
        if isinstance(value, Thing):
            raise DataError(f"{path}: {quote(name)}: a {value.name}, expected a tensor; save it as a plain state dict")
        if not name.isprintable():
            raise DataError(f"{path}: {quote(name)}: control characters in a tensor's name; do not use this file")
    for name, note in notes.items():
        if note.dtype not in DTYPE_NAMES:
            raise DataError(f"{path}: {quote(name)}: of dtype {note.dtype}, which safetensors does not know")
    return notes, dropped + len(table.entries) - len(notes) + table.others


def _bytes(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file_bytes: int, path: Path) -> bytes:
    """The content of a small file in the archive."""
    if info.file_size > MAX_BYTES:
        raise DataError(f"{path}: {info.filename}: {info.file_size} bytes, expected at most {MAX_BYTES}; do not use it")
    _start(archive, info, file_bytes, path)
    with archive.open(info) as member:  # checks its CRC as well
        return member.read(info.file_size + 1)


def _start(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file_bytes: int, path: Path) -> int:
    """Where in the file the content of `info` starts; it lies there as it is.

    A local header has 30 bytes, the name and further fields, whose lengths are its bytes 26 to 29.
    """
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise DataError(
            f"{path}: {quote(info.filename)}: compressed or encrypted, which torch does not do; do not use it"
        )
    file = archive.fp
    assert file is not None
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) != 30 or not header.startswith(b"PK\x03\x04"):
        raise DataError(f"{path}: {quote(info.filename)}: is not where the archive says; download it again")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.file_size > file_bytes:
        raise DataError(f"{path}: {quote(info.filename)}: reaches past the end of the file; download it again")
    return start


def _last(note: TensorNote) -> int:
    """The index of the tensor's last number, counted from its first; for a tensor with numbers."""
    return sum((size - 1) * step for size, step in zip(note.shape, note.stride, strict=True))


def _row_by_row(note: TensorNote) -> bool:
    """Whether the numbers lie in the order in which safetensors has them, without gaps."""
    if 0 in note.shape:
        return True
    expected = 1
    for size, step in zip(reversed(note.shape), reversed(note.stride), strict=True):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def _refuse(start: bytes, path: Path) -> Never:
    """Say what the file is, as it is not one of torch's archives."""
    if start[:1] != b"\x80" and start[257:262] != b"ustar":
        refuse_other_formats(start, path)
    raise UnsafeError(
        f"{path}: no checkpoint that torch 1.6 or later has saved, so it is not opened; if you trust it, open it with "
        "torch.load(..., weights_only=True) and save it again"
    )
