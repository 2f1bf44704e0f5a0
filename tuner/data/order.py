"""Which samples make up which update: a pure function of seed, epoch and place, so that any update can be found again.

The samples of all epochs form one endless line, and each global batch is the next piece of it; so every batch is
full, every sample comes once in each epoch, and `samples_seen` is all that a resumed run has to know.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from tuner.data.example import Size
from tuner.rng import generator_at


@dataclass(frozen=True, slots=True)
class Showing:
    """One sample in one epoch."""

    epoch: int
    sample: int
    stratum: tuple[int, int, int] | None = None
    """The number of its batch, its place in it and the batch's size; None for one that is of no batch."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """An endless shuffled order of samples, in which as many global batches as can be have one bucket only."""

    buckets: tuple[Size, ...]
    """Each sample's bucket; a picture with repeats is several samples."""
    seed: int
    batch_size: int
    """The global batch: samples an update, over all processes."""
    _epochs: dict[int, list[int]] = field(default_factory=dict[int, list[int]], init=False, repr=False, compare=False)

    def at(self, place: int) -> Showing:
        """The showing at `place` of the endless line."""
        epoch, index = divmod(place, len(self.buckets))
        if epoch not in self._epochs:
            for old in [e for e in self._epochs if abs(e - epoch) > 1]:
                del self._epochs[old]
            self._epochs[epoch] = _epoch(self, epoch)
        return Showing(epoch, self._epochs[epoch][index], (*divmod(place, self.batch_size), self.batch_size))

    def batches(self, samples_seen: int) -> Iterator[list[Showing]]:
        """The global batch that begins at `samples_seen`, and each one after it, for ever."""
        place = samples_seen
        while True:
            yield [self.at(place + i) for i in range(self.batch_size)]
            place += self.batch_size


def _epoch(order: Order, epoch: int) -> list[int]:
    """The samples of one epoch, each once.

    Full batches of one bucket each come in random order; what is left over of each bucket fills the batch that the
    epoch before left open, mixed batches in between, and the batch that stays open at the end.
    """
    rng = generator_at(order.seed, "order", epoch)
    groups: dict[Size, list[int]] = {}
    for sample, bucket in enumerate(order.buckets):
        groups.setdefault(bucket, []).append(sample)
    size = order.batch_size
    whole: list[list[int]] = []
    left: list[int] = []
    for bucket in sorted(groups):
        members = _shuffled(groups[bucket], rng)
        full = len(members) // size * size
        whole += [members[i : i + size] for i in range(0, full, size)]
        left += members[full:]
    left = _shuffled(left, rng)
    needed = -epoch * len(order.buckets) % size  # what the last batch of the epoch before still lacks
    while len(left) < needed and whole:
        left += whole.pop(int(torch.randint(len(whole), (), generator=rng)))
    head, left = left[:needed], left[needed:]
    mixed_end = len(left) // size * size
    whole += [left[i : i + size] for i in range(0, mixed_end, size)]
    order_of = torch.randperm(len(whole), generator=rng).tolist()
    return head + [sample for i in order_of for sample in whole[i]] + left[mixed_end:]


def _shuffled(items: Sequence[int], rng: torch.Generator) -> list[int]:
    return [items[i] for i in torch.randperm(len(items), generator=rng).tolist()]


def share(
    batch: Sequence[Showing], buckets: Sequence[Size], micro_batch: int, rank: int, world: int
) -> list[list[Showing]]:
    """This process's part of a global batch, in micro-batches of one bucket and at most `micro_batch` samples.

    The parts of all processes are disjoint, make up the batch, and differ by at most one sample.
    """
    by_bucket = sorted(batch, key=lambda showing: buckets[showing.sample])
    mine = by_bucket[rank * len(batch) // world : (rank + 1) * len(batch) // world]
    parts: list[list[Showing]] = []
    for showing in mine:
        alike = parts and buckets[parts[-1][0].sample] == buckets[showing.sample]
        if alike and len(parts[-1]) < micro_batch:
            parts[-1].append(showing)
        else:
            parts.append([showing])
    return parts
