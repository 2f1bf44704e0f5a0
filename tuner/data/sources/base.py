"""A data set, or a part of one, as a config names it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

from tuner.data.example import Example, Size
from tuner.errors import DataError, UnsafeError, UserError
from tuner.plugins import Folder


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

    def examples(self, unmade: Size | None = None) -> Sequence[Example]:
        """Every picture, in an order that never changes; headers are read, pixels are not.

        Where `unmade` is given, pictures that are still wanted count as if they were there, and of that size.

        Raises:
            UserError: nothing there, an unreadable picture, or one without a caption; the message names the file.
        """
        ...


@runtime_checkable
class Listing(Protocol):
    """A source that can be read on where something in it is wrong."""

    def read(self) -> tuple[Sequence[Example], Sequence[UserError]]:
        """The examples that are whole, and all that is wrong with the others.

        Raises:
            UserError: nothing can be read at all.
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
        UserError: see `Source.examples`.
    """
    if captioned:
        return [example for source in sources for example in source.examples(unmade)]
    bare = [source.uncaptioned() if isinstance(source, Captioned) else source for source in sources]
    return [replace(example, caption="") for source in bare for example in source.examples(unmade)]


def whole(examples: Sequence[Example], wrong: Sequence[UserError]) -> Sequence[Example]:
    """`examples`, where nothing is wrong.

    Raises:
        DataError, UnsafeError: all that is wrong, a line each.
    """
    if wrong:
        kind = UnsafeError if any(isinstance(error, UnsafeError) for error in wrong) else DataError
        raise kind("\n".join(map(str, wrong)))
    return examples


AnySource = Annotated[Source, Folder("tuner.data.sources")]
