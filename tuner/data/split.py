"""Training pictures and those held out of it, told apart by what they hold.

The side of a picture depends on its own bytes and on which others look like it, so that it stays when files are renamed
or others are added, and no picture is judged on that has nearly been trained on.
"""

from collections.abc import Callable, Iterable, Sequence

from tuner.data.cache import Cache
from tuner.data.example import Example
from tuner.data.hashes import file_hashes
from tuner.data.lookalikes import groups, looks
from tuner.errors import DataError


def hold_out(
    examples: Sequence[Example],
    share: float,
    background: str,
    cache: Cache,
    progress: Callable[[Sequence[str], str], Iterable[str]],
) -> tuple[list[Example], list[Example]]:
    """As `split`, after a look at each picture, on `background` where it is transparent; all are trained on at 0.

    Raises:
        DataError: pictures that cannot be decoded, or one of both sides would be empty.
    """
    if not share:
        return list(examples), []
    files = [example.image for example in examples]
    hashes = file_hashes(files, cache.folder, cache.read_only)
    return split(examples, hashes, groups(looks(files, hashes, background, cache, progress)), share)


def split(
    examples: Sequence[Example], hashes: Sequence[str], alike: Sequence[Sequence[int]], share: float
) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and about `share` of them that are held out.

    `hashes` are SHA-256 of the pictures' files, `alike` the groups of indices of those that show the same.

    Class pictures are not held out: what is taught is the others, and a loss that is mostly the class's falls, or does
    not, whatever becomes of them. One that shows the same as a held-out picture is not trained on either.

    Raises:
        DataError: one of both sides would be empty.
    """
    taught = [example.source != "class" for example in examples]
    decides = [digest if own else None for digest, own in zip(hashes, taught, strict=True)]
    for group in alike:
        of_group = min((hashes[index] for index in group if taught[index]), default=None)
        for index in group:
            decides[index] = of_group
    held_out = [digest is not None and int(digest[:13], 16) < share * 16**13 for digest in decides]
    training = [example for example, out in zip(examples, held_out, strict=True) if not out]
    held = [example for example, out, own in zip(examples, held_out, taught, strict=True) if out and own]
    if not 0 < len(held) < sum(taught):
        what = "none" if not held else "all"
        raise DataError(
            f"of {sum(taught)} pictures {what} would be held out at a share of {share}; take another share, or give "
            "held-out pictures as a source of their own"
        )
    return training, held
