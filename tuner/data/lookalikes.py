"""Pictures that show the same: copies, scaled, saved again with loss, or slightly retouched.

Each picture is reduced to its look: 256 bits of which neighbouring parts are brighter (a difference hash), and a
thumbnail of 16 x 16 pixels. Two look alike when few bits differ and the thumbnails are close.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tuner.data.ahead import ahead
from tuner.data.cache import Cache, address
from tuner.data.images import load_picture, unloadable
from tuner.errors import DataError

BITS = 12
"""Of 256 bits, so many may differ."""
LEVELS = 6.0
"""By so much, of 255, thumbnails may differ in the mean."""
BANDS = [(i * 32 // (BITS + 1), (i + 1) * 32 // (BITS + 1)) for i in range(BITS + 1)]
"""Bytes of the hash: where at most `BITS` differ, one of these bands is equal."""


@dataclass(frozen=True)
class Look:
    """What a picture looks like from afar."""

    bits: NDArray[np.uint8]
    """`[32]`"""
    thumbnail: NDArray[np.uint8]
    """`[16, 16, 3]`"""


def look(picture: Image.Image) -> Look:
    """The look of an upright RGB picture."""
    grey = np.asarray(picture.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    thumbnail = np.asarray(picture.resize((16, 16), Image.Resampling.BOX), np.uint8)
    return Look(np.packbits(grey[:, 1:] > grey[:, :-1]), thumbnail)


def looks(
    files: Sequence[Path],
    hashes: Sequence[str],
    background: str,
    cache: Cache,
    progress: Callable[[Sequence[str], str], Iterable[str]],
) -> list[Look]:
    """The look of each file, kept in the cache by its content's hash, if it is not read-only.

    Raises:
        DataError: pictures that cannot be decoded, all named.
    """
    found, wrong = _new_looks(files, hashes, background, cache, progress)
    if wrong:
        raise DataError("\n".join(map(str, wrong)))
    for key in {_address(digest, background) for digest in hashes} - found.keys():
        entry = cache.read(key)
        found[key] = Look(entry["bits"].numpy(), entry["thumbnail"].numpy())
    return [found[_address(digest, background)] for digest in hashes]


def note_looks(
    files: Sequence[Path],
    hashes: Sequence[str],
    background: str,
    cache: Cache,
    progress: Callable[[Sequence[str], str], Iterable[str]],
) -> list[DataError]:
    """Put looks that are missing into the cache, if it is not read-only; what is wrong with files that have none."""
    return _new_looks(files, hashes, background, cache, progress)[1]


def _new_looks(
    files: Sequence[Path],
    hashes: Sequence[str],
    background: str,
    cache: Cache,
    progress: Callable[[Sequence[str], str], Iterable[str]],
) -> tuple[dict[str, Look], list[DataError]]:
    """As `note_looks`, with the looks that were missing, by their addresses."""
    missing: dict[str, list[Path]] = defaultdict(list)
    for digest, file in zip(hashes, files, strict=True):
        missing[_address(digest, background)].append(file)
    missing = {key: copies for key, copies in missing.items() if not cache.has(key)}
    found: dict[str, Look] = {}
    wrong: list[DataError] = []
    with closing(ahead(missing.values(), lambda copies: look(load_picture(copies[0], background)))) as waiting:
        for key in progress(list(missing), "looking at pictures"):
            try:
                seen = found[key] = next(waiting)()
            except DataError:
                wrong += unloadable(missing[key])
                continue
            if not cache.read_only:
                bits, thumbnail = torch.from_numpy(seen.bits), torch.from_numpy(seen.thumbnail.copy())
                cache.write(key, {"bits": bits, "thumbnail": thumbnail})
    return found, wrong


def _address(digest: str, background: str) -> str:
    return address(look=1, picture=digest, background=background)


def alike(one: Look, other: Look) -> bool:
    """Whether two pictures show the same."""
    if int(np.bitwise_count(one.bits ^ other.bits).sum()) > BITS:
        return False
    difference = np.abs(one.thumbnail.astype(np.int16) - other.thumbnail.astype(np.int16))
    return float(difference.mean()) <= LEVELS


def groups(looks: Sequence[Look]) -> list[list[int]]:
    """Indices of pictures that look alike, directly or by way of others; only groups of two or more.

    Only pictures that share a band of bits are compared, and of those only such of about one brightness.
    """
    parent = list(range(len(looks)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    means = [float(each.thumbnail.mean()) for each in looks]
    same: dict[bytes, int] = {}
    for index, each in enumerate(looks):
        parent[index] = same.setdefault(each.bits.tobytes() + each.thumbnail.tobytes(), index)
    for start, end in BANDS:
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for index in same.values():
            buckets[looks[index].bits[start:end].tobytes()].append(index)
        for bucket in buckets.values():
            bucket.sort(key=means.__getitem__)
            for place, index in enumerate(bucket):
                for other in bucket[place + 1 :]:
                    if means[other] - means[index] > LEVELS:
                        break
                    if root(index) != root(other) and alike(looks[index], looks[other]):
                        parent[max(root(index), root(other))] = min(root(index), root(other))
    found: dict[int, list[int]] = defaultdict(list)
    for index in range(len(looks)):
        found[root(index)].append(index)
    return [members for members in found.values() if len(members) > 1]
