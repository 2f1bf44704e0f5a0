"""Named tensors at rest: described without being read, and read one at a time.

`parse_header` is the only reader of safetensors headers in the project. It refuses what the format forbids and readers
commonly let pass: gaps and overlaps in the data, a file shorter or longer than its header says, a name given twice,
control characters in names. What it accepts, every other reader understands in the same way.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Never, Protocol, cast

import torch
from torch import Tensor

from tuner.errors import DataError, ResourceError, UnsafeError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names for dtypes."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 25_000_000
"""Larger headers are refused: a legal one of 90 MB costs a JSON reader gigabytes of memory."""


@dataclass(frozen=True)
class TensorMeta:
    """A tensor's shape and dtype, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Location:
    """Where a tensor's values lie as plain bytes: row by row, little-endian, without gaps."""

    path: Path
    offset: int
    """Of the first byte, from the start of the file."""
    meta: TensorMeta
    file_bytes: int
    """The size of the whole file when its header was read; a file of another size by now has been changed."""


class TensorStore(Protocol):
    """Something that holds named tensors."""

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's name, shape and dtype; reads no values."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor `name`, freshly allocated on the CPU.

        Raises:
            KeyError: there is none of that name.
        """
        ...

    def locate(self, name: str) -> Location | None:
        """Where the values of `name` lie in a file; None when they are computed.

        Raises:
            KeyError: there is none of that name.
        """
        ...


@dataclass(frozen=True)
class Header:
    """What the head of a safetensors file says."""

    metas: Mapping[str, TensorMeta]
    """In the order of the values in the file."""
    offsets: Mapping[str, int]
    """Where each tensor's values start, from the start of the file."""
    metadata: Mapping[str, str]
    data_start: int
    file_bytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A `.safetensors` file, read tensor by tensor."""

    path: Path

    @cached_property
    def header(self) -> Header:
        """The checked header.

        Raises:
            DataError: not a whole and valid safetensors file; the message names file and tensor.
            UnsafeError: the file is a pickle.
        """
        with open_file(self.path) as file:
            return parse_header(file, self.path)

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's name, shape and dtype, in the order of the file."""
        return self.header.metas

    @property
    def metadata(self) -> Mapping[str, str]:
        """The free texts in the header; empty when there are none."""
        return self.header.metadata

    def locate(self, name: str) -> Location:
        """Where the values of `name` lie."""
        return Location(self.path, self.header.offsets[name], self.metas[name], self.header.file_bytes)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, freshly allocated on the CPU.

        Raises:
            KeyError: there is none of that name.
            DataError: the file is no longer the one whose header was read.
        """
        return read_location(self.locate(name), name)


@dataclass(frozen=True)
class ShardedFile:
    """A checkpoint in several safetensors files, bound by a `….safetensors.index.json`."""

    index: Path

    @cached_property
    def _shards(self) -> Mapping[str, SafetensorsFile]:
        """The file of each tensor.

        Raises:
            UnsafeError: a shard lies outside of the index's folder.
            DataError: index and shards do not agree.
        """
        with open_file(self.index) as file:
            text = file.read(MAX_HEADER_BYTES + 1)
        refuse_other_formats(text[:512], self.index)
        content = _json_object(text, self.index)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict):
            raise DataError(f"{self.index}: weight_map: missing, expected a table of tensor names and files")
        weight_map = cast(dict[str, object], weight_map)
        files: dict[str, SafetensorsFile] = {}
        for file_name in sorted({str(name) for name in weight_map.values()}):
            path = self.index.parent / file_name
            if PurePosixPath(file_name).name != file_name or not re.fullmatch(r"[\w.\-]+\.safetensors", file_name):
                raise UnsafeError(f"{self.index}: weight_map: {quote(file_name)} is no plain file name; do not use it")
            if not path.is_file():
                raise DataError(f"{self.index}: weight_map: {file_name} is missing; download the folder again")
            refuse_outside(path, self.index.parent)
            files[file_name] = SafetensorsFile(path)
        found: dict[str, SafetensorsFile] = {}
        for file_name, shard in files.items():
            for name in shard.metas:
                if name in found:
                    both = f"{found[name].path.name} and {file_name}"
                    raise DataError(f"{self.index}: {quote(name)} is in both {both}; download the folder again")
                if weight_map.get(name) != file_name:
                    raise DataError(
                        f"{self.index}: {quote(name)} is in {file_name}, which the index does not say; "
                        "download the folder again"
                    )
                found[name] = shard
        if lost := [name for name in weight_map if name not in found]:
            raise DataError(
                f"{self.index}: {quote(lost[0])} is not in {weight_map[lost[0]]} ({len(lost)} such); "
                "download the folder again"
            )
        return found

    @cached_property
    def _metas(self) -> Mapping[str, TensorMeta]:
        return {name: shard.metas[name] for name, shard in self._shards.items()}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's name, shape and dtype."""
        return self._metas

    def locate(self, name: str) -> Location:
        """Where the values of `name` lie."""
        return self._shards[name].locate(name)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, freshly allocated on the CPU."""
        return self._shards[name].read(name)


def read_location(location: Location, name: str) -> Tensor:
    """The tensor at `location`, freshly allocated on the CPU; `name` is for the messages.

    Raises:
        DataError: the file is no longer the one whose header was read.
    """
    path, meta = location.path, location.meta
    values = torch.empty(meta.bytes, dtype=torch.uint8)
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size != location.file_bytes:
            raise DataError(f"{path}: changed its size while it was read; wait until it is complete")
        file.seek(location.offset)
        got = file.readinto(values.numpy())  # pyright: ignore[reportArgumentType] (arrays are buffers)
    if got != meta.bytes:
        raise DataError(f"{path}: {quote(name)}: {got} of {meta.bytes} bytes could be read; copy it again")
    return values.view(meta.dtype).reshape(meta.shape)


def refuse_outside(path: Path, folder: Path) -> None:
    """Refuse a file of a model folder that is a link to somewhere else, except into the hub's own cache.

    The cache keeps contents in `models--…/blobs`, and links to them in `models--…/snapshots/COMMIT`.

    Raises:
        UnsafeError: `path` leads out of `folder`.
    """
    real = path.resolve()
    allowed = [folder.resolve()]
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.parent.name == "snapshots":
            allowed.append((place.parent.parent / "blobs").resolve())
    if not any(real.is_relative_to(place) for place in allowed):
        raise UnsafeError(f"{path}: a link that leads out of its model's folder, to {real}; put the file itself there")


def check_model_folder(folder: Path, components: Iterable[str] = ("unet", "vae", "text_encoder")) -> None:
    """Look through a diffusers folder before other libraries open it, as not all of them refuse what they should.

    In the folders of `components` every safetensors file must be whole, and every index must stay in its folder.

    Raises:
        DataError: a damaged file.
        UnsafeError: a component's weights are only there as a pickle, or an index points elsewhere.
    """
    for path in sorted(path for component in components for path in (folder / component).glob("*")):
        if path.name.endswith(".safetensors.index.json"):
            _ = ShardedFile(path).metas
        elif path.suffix == ".safetensors":
            _ = SafetensorsFile(path).header
        elif path.suffix in {".bin", ".ckpt", ".pt", ".pth"} and not list(path.parent.glob("*.safetensors")):
            refuse_pickle(path)


def parse_header(file: BufferedReader, path: Path) -> Header:
    """The header of the open safetensors `file`; `path` is for the messages.

    Raises:
        DataError: not a whole and valid safetensors file; the message names file and tensor.
        UnsafeError: the file is a pickle.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    start = file.read(512)
    refuse_other_formats(start, path)
    length = int.from_bytes(start[:8], "little")
    if file_bytes < 10:
        raise DataError(f"{path}: only {file_bytes} bytes long, expected a safetensors file; download it again")
    if length > MAX_HEADER_BYTES and start[8:9] != b"{":
        raise DataError(f"{path}: not a safetensors file; check where it comes from")
    if length > MAX_HEADER_BYTES:
        raise DataError(f"{path}: header of {length} bytes, expected at most {MAX_HEADER_BYTES}; do not use it")
    if 8 + length > file_bytes:
        raise DataError(f"{path}: ends inside its header ({file_bytes} bytes); download it again")
    file.seek(8)
    text = file.read(length)
    if not text.startswith(b"{"):
        raise DataError(
            f"{path}: header does not start with '{{', so it is no safetensors file; check where it comes from"
        )
    entries = _json_object(text, path)
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    spans = sorted((_entry(name, entry, path) for name, entry in entries.items()), key=lambda span: span[1:3])
    metas: dict[str, TensorMeta] = {}
    offsets: dict[str, int] = {}
    data_start = 8 + length
    expected = 0
    for name, begin, end, meta in spans:
        if begin != expected:
            fault = "overlaps the tensor before it" if begin < expected else f"leaves a gap of {begin - expected} bytes"
            raise DataError(f"{path}: {quote(name)}: {fault}; the file is damaged, download it again")
        metas[name] = meta
        offsets[name] = data_start + begin
        expected = end
    if data_start + expected != file_bytes:
        last = f"{quote(spans[-1][0])}: " if spans else ""
        raise DataError(
            f"{path}: {last}{file_bytes} bytes long, expected {data_start + expected}; the file is damaged or still "
            "being written, download it again"
        )
    return Header(metas, offsets, metadata, data_start, file_bytes)


def _entry(name: str, entry: object, path: Path) -> tuple[str, int, int, TensorMeta]:
    """One tensor's name, first and last offset in the data, and meta."""
    if not name.isprintable():
        raise DataError(f"{path}: {quote(name)}: control characters in a tensor's name; do not use this file")

    def fail(what: str) -> Never:
        raise DataError(f"{path}: {quote(name)}: {what}; the file is damaged, download it again")

    table = cast(dict[str, object], entry) if isinstance(entry, dict) else {}
    if set(table) != {"dtype", "shape", "data_offsets"}:
        fail("expected dtype, shape and data_offsets, and nothing else")
    dtype = table["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        fail(f"unknown dtype {quote(str(dtype))}")
    sizes = _whole_numbers(table["shape"])
    offsets = _whole_numbers(table["data_offsets"])
    if sizes is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        fail("sizes and offsets must be whole numbers, and offsets a range")
    begin, end = offsets
    elements = 1
    for size in sizes:
        elements *= size
    if elements * DTYPES[dtype].itemsize != end - begin:
        fail(f"{dtype} of shape {sizes} does not fill its {end - begin} bytes")
    return name, begin, end, TensorMeta(tuple(sizes), DTYPES[dtype])


def _whole_numbers(value: object) -> list[int] | None:
    """`value` where it is a list of numbers from 0 on that fit into 64 bits, else None."""
    numbers = cast(list[object], value) if isinstance(value, list) else [None]
    fits = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    return cast(list[int], numbers) if fits else None


def _metadata(value: object, path: Path) -> Mapping[str, str]:
    if isinstance(value, dict):
        table = cast(dict[str, object], value)
        if all(isinstance(text, str) for text in table.values()):
            return cast(dict[str, str], table)
    raise DataError(f"{path}: __metadata__: expected a table of texts; the file is damaged, download it again")


def _json_object(text: bytes, path: Path) -> dict[str, object]:
    """`text` as a JSON object in which no key is given twice."""
    if len(text) > MAX_HEADER_BYTES:
        raise DataError(f"{path}: larger than {MAX_HEADER_BYTES} bytes; do not use it")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{path}: {quote(twice)} is given twice; do not use this file")
        return table

    def constant(word: str) -> Never:
        raise DataError(f"{path}: {word} is no JSON; the file is damaged, download it again")

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: header is no valid JSON; the file is damaged, download it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: header is no JSON object; the file is damaged, download it again")
    return cast(dict[str, object], content)


def refuse_other_formats(start: bytes, path: Path) -> None:
    """Say what the file is, where it is a thing that commonly lies under a `.safetensors` name."""
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 40:
        return  # a header's length may well look like the first letters of something else
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{path}: a git-lfs pointer, not the weights; run 'git lfs pull' in its folder")
    if start.lstrip()[:1] == b"<":
        raise DataError(f"{path}: a web page, not a safetensors file; the download failed, repeat it")
    if start.startswith(b"GGUF"):
        raise DataError(f"{path}: a GGUF file; use the model's .safetensors file")
    if start.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", start) or start[257:262] == b"ustar":
        refuse_pickle(path)


def refuse_pickle(path: Path) -> Never:
    other = path.with_suffix(".safetensors") if path.suffix != ".safetensors" else path.with_stem(f"{path.stem}-safe")
    raise UnsafeError(
        f"{path}: a pickle, which can run code when it is opened; use the model's .safetensors file, or make one with "
        f"'tuner convert {path.name} {other.name}'"
    )


def open_file(path: Path) -> BufferedReader:
    """`path` for reading.

    Raises:
        DataError: there is no such file, or it is none.
        ResourceError: the file is there and cannot be opened.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}, expected a weights file")
        return path.open("rb")
    except OSError as error:
        raise ResourceError(f"{path}: cannot be opened: {error.strerror}; check its permissions") from error


def quote(name: str) -> str:
    """`name` for a message: control characters escaped, length bounded."""
    text = ascii(name) if not name.isprintable() else repr(name)
    return text if len(text) <= 120 else text[:100] + "…'"
