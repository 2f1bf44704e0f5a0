"""Pictures that cannot be decoded, found before a run begins, so that it can go on without them."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tuner.data.cache import Cache
from tuner.data.hashes import file_hashes
from tuner.data.images import BrokenPicture, Pictures
from tuner.data.lookalikes import note_looks
from tuner.data.sources.base import Source, read_all, whole


def find_broken(
    sources: Sequence[Source],
    pictures: Pictures,
    cache: Cache,
    progress: Callable[[Sequence[str], str], Iterable[str]],
) -> dict[Path, str]:
    """Pictures of `sources` that are to be left out, since they cannot be decoded, and what is wrong with each.

    There are none unless `pictures.broken` is `skip`. Then each picture is decoded once: the cache keeps a look of
    those that could be, by what they hold. Captions are not read.

    Raises:
        UserError: what else is wrong with the sources, but for captions.
    """
    if pictures.broken == "refuse":
        return {}
    examples, wrong = read_all(sources, captioned=False, unmade=(1, 1))
    there = list(dict.fromkeys(example.image for example in examples if example.image.exists()))
    hashes = file_hashes(there, cache.folder, cache.read_only)
    wrong += note_looks(there, hashes, pictures.background, cache, progress)
    whole((), [error for error in wrong if not isinstance(error, BrokenPicture)])
    return {error.file: str(error) for error in wrong if isinstance(error, BrokenPicture)}
