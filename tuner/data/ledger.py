"""Which picture a run has shown how often: a pure function of its order and of `samples_seen`; no log is needed."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from tuner.data.example import Example
from tuner.data.order import Order
from tuner.weights.writer import resource_error


def times_seen(order: Order, samples_seen: int) -> NDArray[np.int64]:
    """How often each sample is among the first `samples_seen` showings, `[samples]`.

    Every whole epoch shows each once, so only the last one is gone through.
    """
    count = len(order.buckets)
    epochs, begun = divmod(samples_seen, count)
    seen = np.full(count, epochs, np.int64)
    for place in range(epochs * count, epochs * count + begun):
        seen[order.at(place).sample] += 1
    return seen


@dataclass(frozen=True)
class Line:
    """One picture, or all pictures of a source."""

    name: str
    source: str
    an_epoch: int
    """How often an epoch shows it: its repeats, in every area that it is shown at."""
    seen: int


@dataclass(frozen=True)
class OfSource:
    """The pictures of one source."""

    source: str
    pictures: int
    an_epoch: tuple[int, int]
    """The least and the most that an epoch shows one of them."""
    seen: tuple[int, int]
    """As `an_epoch`, in the whole run so far."""
    showings: int
    """Of all of them."""


class Ledger:
    """How often each picture was shown."""

    def __init__(self, examples: Sequence[Example], samples: Sequence[int], seen: NDArray[np.int64]) -> None:
        """`samples` are each sample's example, `seen` how often each sample was shown."""
        index: dict[tuple[str, Path], int] = {}
        place = np.array([index.setdefault((e.source, e.image), len(index)) for e in examples], np.int64)
        of = place[np.asarray(samples, np.int64)]
        self.pictures = list(index)
        """Source and file of each; one that is shown at several sizes, or listed twice, is one picture."""
        self.an_epoch = np.bincount(of, minlength=len(index)).astype(np.int64)
        self.seen = np.zeros(len(index), np.int64)
        np.add.at(self.seen, of, seen)

    def line(self, index: int) -> Line:
        """Of one picture."""
        source, image = self.pictures[index]
        return Line(str(image), source, int(self.an_epoch[index]), int(self.seen[index]))

    def sources(self) -> list[OfSource]:
        """Each source, in the order in which they come."""
        names = np.array([source for source, _ in self.pictures])
        found: list[OfSource] = []
        for name in dict.fromkeys(names.tolist()):
            an_epoch, seen = self.an_epoch[names == name], self.seen[names == name]
            ends = [(int(part.min()), int(part.max())) for part in (an_epoch, seen)]
            found.append(OfSource(name, len(seen), ends[0], ends[1], int(seen.sum())))
        return found

    def least(self, count: int) -> list[Line]:
        """Those that were seen least."""
        return [self.line(int(i)) for i in np.argsort(self.seen, kind="stable")[:count]]

    def most(self, count: int) -> list[Line]:
        """Those that were seen most."""
        return [self.line(int(i)) for i in np.argsort(-self.seen, kind="stable")[:count]]

    def write_csv(self, file: Path) -> None:
        """A line for every picture.

        Raises:
            ResourceError: it cannot be written.
        """
        partial = file.with_name(f".{file.name}-{uuid4().hex}")
        try:
            with partial.open("w", encoding="utf-8", newline="") as opened:
                rows = csv.writer(opened)
                rows.writerow(["picture", "source", "an_epoch", "seen"])
                for index in range(len(self.pictures)):
                    of = self.line(index)
                    rows.writerow([of.name, of.source, of.an_epoch, of.seen])
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise resource_error(file, error) from error
