"""A data set, or a part of one, as a config names it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Protocol, runtime_checkable

from tuner.data.example import Example, Size
from tuner.data.images import BrokenPicture, noted, unloadable, upright_size
from tuner.errors import DataError, UnsafeError, UserError
from tuner.plugins import Folder

Broken = Mapping[Path, str]
"""Pictures that are known not to be decodable, and what is wrong with each."""
NONE: Broken = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A picture that the base model has to make before the source can be read."""

    image: Path
    prompt: str
    seed: int


class Source(Protocol):
    """A data set, or a part of one."""

    def wanted(self, base: str, contents: str | None) -> Sequence[Wanted]:
        """Pictures that are still to be made by the model `base`; none for most sources.

        `contents` is a hash of all that the model holds, by which it is known under any name; None where the model is
        not on this machine yet.

        Raises:
            UserError: pictures that are there were made by another model or from another prompt.
        """
        ...

    def read(self, unmade: Size | None = None, broken: Broken = NONE) -> tuple[Sequence[Example], Sequence[UserError]]:
        """Every picture that is whole, in an order that never changes, and all that is wrong with the others.

        Headers are read, pixels are not. Pictures that are `broken` count among the others, whatever their headers say;
        for each that cannot be decoded there is a `BrokenPicture`, unless no other is left, which is an error like any.
        Where `unmade` is given, pictures that are still wanted count as if they were there, and of that size.

        Raises:
            UserError: nothing can be read at all.
        """
        ...

    def examples(self, unmade: Size | None = None) -> Sequence[Example]:
        """The pictures that `read` gives, where nothing is wrong.

        Raises:
            UserError: nothing there, an unreadable picture, or one without a caption; the message names the file.
        """
        ...


@runtime_checkable
class Captioned(Protocol):
    """A source that refuses pictures without captions."""

    def uncaptioned(self) -> Source:
        """The same pictures, of which none needs a caption, and none is read."""
        ...


def every_example(sources: Sequence[Source], *, captioned: bool = True, unmade: Size | None = None) -> list[Example]:
    """Every picture of all; without captions where they tell a model nothing, so that none needs one.

    Raises:
        UserError: see `Source.examples`; all that is wrong with any of the sources.
    """
    return without(sources, NONE, captioned=captioned, unmade=unmade)[0]


def without(
    sources: Sequence[Source], broken: Broken, *, captioned: bool = True, unmade: Size | None = None
) -> tuple[list[Example], list[BrokenPicture]]:
    """As `every_example`, but for pictures that are `broken`, as if these were not there; and what is wrong with each.

    Raises:
        UserError: as for `every_example`, also a picture that is broken and not among `broken`.
    """
    found, wrong = read_all(sources, broken, captioned=captioned, unmade=unmade)
    left_out, others = told_apart(wrong, broken)
    return list(whole(found, others)), left_out


def told_apart(wrong: Sequence[UserError], broken: Broken) -> tuple[list[BrokenPicture], list[UserError]]:
    """Of `wrong`, what is said of `broken` pictures, each once, and all else."""
    left_out = {str(e): e for e in wrong if isinstance(e, BrokenPicture) and e.file in broken}
    return list(left_out.values()), [error for error in wrong if str(error) not in left_out]


def read_all(
    sources: Sequence[Source], broken: Broken = NONE, *, captioned: bool = True, unmade: Size | None = None
) -> tuple[list[Example], list[UserError]]:
    """What `Source.read` gives of all of them together."""
    if not captioned:
        sources = [source.uncaptioned() if isinstance(source, Captioned) else source for source in sources]
    examples: list[Example] = []
    wrong: list[UserError] = []
    for source in sources:
        try:
            found, faults = source.read(unmade, broken)
        except (DataError, UnsafeError) as error:
            found, faults = [], [noted(error)]
        examples += found if captioned else [replace(example, caption="") for example in found]
        wrong += faults
    return examples, wrong


def whole(examples: Sequence[Example], wrong: Sequence[UserError]) -> Sequence[Example]:
    """`examples`, where nothing is wrong.

    Raises:
        DataError, UnsafeError: all that is wrong, a line each; pixels are read for it, too.
    """
    if wrong:
        there = (example.image for example in examples if example.image.exists())
        kind = UnsafeError if any(isinstance(error, UnsafeError) for error in wrong) else DataError
        raise kind("\n".join(dict.fromkeys(map(str, [*wrong, *unloadable(there)]))))
    return examples


def left(examples: Sequence[Example], wrong: Sequence[UserError]) -> Sequence[UserError]:
    """`wrong`; where it leaves nothing of a source, broken pictures in it are errors like all others.

    A folder of which nothing can be read is rather one that is not there, or may not be read, than one to go without.
    """
    return (
        wrong if examples else [DataError(str(error)) if isinstance(error, BrokenPicture) else error for error in wrong]
    )


def size_of(image: Path, broken: Broken) -> Size:
    """A picture's size by its header.

    Raises:
        BrokenPicture: it is one of `broken`, or its header says so.
        DataError: as for `upright_size`.
    """
    if image in broken:
        raise BrokenPicture(image, broken[image])
    return upright_size(image)


def refuse_other_size(file: Path, size: Size) -> None:
    """Raises: DataError: `file`, which lies beside a picture of `size`, cannot be read or is of another one."""
    try:
        found = upright_size(file)
    except BrokenPicture as error:  # it is no picture that could be left out
        raise DataError(str(error)) from error
    if found != size:
        raise DataError(f"{file}: is not of its picture's size, {size[0]} x {size[1]}; make it so")


AnySource = Annotated[Source, Folder("tuner.data.sources")]
