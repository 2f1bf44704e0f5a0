"""The data of a run as a stream of global batches, from any place on."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tuner.data.captions import Captions
from tuner.data.encode import Encoded
from tuner.data.example import Size
from tuner.data.order import Order, Showing, share
from tuner.data.variants import flip_at, number_at
from tuner.diffusion.batch import Batch, Conditioning, GlobalBatch
from tuner.diffusion.model import DiffusionModel
from tuner.rng import Position

AHEAD = 2
"""Global batches that are read from disk while another is trained on."""
TEXTS = 256 * 2**20
"""Bytes of encoded captions that are kept in memory: a thousand of CLIP's, 64 of T5-XXL's."""


Way = tuple[int, bool, int]
"""How a showing shows: the example, whether it is mirrored, and its variant."""


@dataclass(frozen=True, kw_only=True)
class DataStream:
    """This process's share of each global batch."""

    model: DiffusionModel
    encoded: Encoded
    captions: Captions
    order: Order
    micro_batch: int
    rank: int
    world: int
    device: torch.device
    learns_text: bool
    """Whether a text encoder learns, so that captions are encoded with gradient by the objective."""

    @cached_property
    def samples(self) -> list[int]:
        """Each sample's example; an example with repeats is several samples."""
        return expand([example.repeats for example in self.encoded.examples])

    def name_of(self, sample: int) -> str:
        """The file of a sample."""
        return str(self.encoded.examples[self.samples[sample]].image)

    def __call__(self, samples_seen: int) -> Iterator[GlobalBatch]:
        """The global batch that begins at `samples_seen`, and each one after it, for ever."""
        batches = self.order.batches(samples_seen)
        with ThreadPoolExecutor(1, thread_name_prefix="data") as reader:
            waiting: list[Future[GlobalBatch]] = [reader.submit(self._read, next(batches)) for _ in range(AHEAD)]
            try:
                while True:
                    waiting.append(reader.submit(self._read, next(batches)))
                    yield self._place(waiting.pop(0).result())
            finally:
                for future in waiting:
                    future.cancel()

    def _read(self, showings: Sequence[Showing]) -> GlobalBatch:
        examples = self.encoded.examples
        parts = share(showings, self.order.buckets, self.micro_batch, self.rank, self.world)
        return GlobalBatch(
            micro_batches=[self._batch(part) for part in parts],
            samples=len(showings),
            weight=sum(examples[self.samples[showing.sample]].weight for showing in showings),
        )

    def _batch(self, showings: Sequence[Showing]) -> Batch:
        positions = [Position(self.order.seed, at.epoch, at.sample, at.stratum) for at in showings]
        chosen = [self.samples[at.sample] for at in positions]
        ways = [self._way(at) for at in positions]
        frames = [self.encoded.variant(i, number).crop.frame(flip) for i, flip, number in ways]
        captions = [
            self.captions.at(self.encoded.examples[i].caption, at) for i, at in zip(chosen, positions, strict=True)
        ]
        latents = torch.stack([self._latents(way, at) for way, at in zip(ways, positions, strict=True)])
        return Batch(
            latents=latents,
            captions=captions,
            conditioning=self._cached_conditioning(captions),
            weight=torch.tensor([self.encoded.examples[i].weight for i in chosen]),
            positions=positions,
            frame=torch.tensor(frames, dtype=torch.float32),
            mask=self._mask(ways, (latents.shape[3], latents.shape[2])),
            prior=self._prior(chosen),
            image=self._guides(ways, positions),
        )

    def _way(self, at: Position) -> Way:
        pictures = self.encoded.pictures
        return self.samples[at.sample], flip_at(pictures, at), number_at(pictures, at)

    def _mask(self, ways: Sequence[Way], size: Size) -> Tensor | None:
        found = [self.encoded.weights(i, flip, size, number) for i, flip, number in ways]
        if all(mask is None for mask in found):
            return None
        return torch.stack([torch.ones(1, size[1], size[0]) if mask is None else mask for mask in found])

    def _guides(self, ways: Sequence[Way], positions: Sequence[Position]) -> Tensor | None:
        """In pixels; the device makes of them what stands beside the latents."""
        kind = self.model.guide
        if kind is None:
            return None
        each = zip(ways, positions, strict=True)
        return torch.stack([self.encoded.guide(kind, i, flip, at, number) for (i, flip, number), at in each])

    def _prior(self, chosen: Sequence[int]) -> Tensor | None:
        prior = [self.encoded.examples[i].prior for i in chosen]
        return torch.tensor(prior) if any(prior) else None

    def _latents(self, way: Way, at: Position) -> Tensor:
        mean, std = self.encoded.latents(*way)
        if self.encoded.pictures.latents == "mean":
            return mean
        return mean + std * torch.randn(mean.shape, generator=at.generator("latents"))

    def _cached_conditioning(self, captions: Sequence[str]) -> Conditioning | None:
        if self.learns_text or self.encoded.text_encoder is None:
            return None
        return Conditioning.stack([self._text(caption) for caption in captions])

    @cached_property
    def _text(self) -> "Recent":
        return Recent(self.encoded.text, TEXTS)

    def _place(self, batch: GlobalBatch) -> GlobalBatch:
        """The batch on the device, its captions encoded where they are not cached and no encoder learns."""
        return GlobalBatch(
            micro_batches=[self._place_micro(micro) for micro in batch.micro_batches],
            samples=batch.samples,
            weight=batch.weight,
        )

    def _place_micro(self, batch: Batch) -> Batch:
        conditioning = batch.conditioning
        if conditioning is not None:
            conditioning = conditioning.to(self.device)
        elif not self.learns_text:
            with torch.no_grad():
                conditioning = self.model.encode_text(batch.captions)
        placed = {
            name: part.to(self.device)
            for name in ("latents", "weight", "frame", "mask")
            if (part := getattr(batch, name)) is not None
        }
        if batch.image is not None:
            guides = self.encoded.pictures.guides
            kept = torch.tensor([guides.keeps(at.generator("guide dropout")) for at in batch.positions])
            with torch.no_grad():
                image = self.model.encode_guide(batch.image.to(self.device))
            placed["image"] = image * kept.to(image)[:, None, None, None]
        return replace(batch, conditioning=conditioning, **placed)


class Recent:
    """What `read` gave of the keys asked for last, kept up to so many bytes."""

    def __init__(self, read: Callable[[str], Mapping[str, Tensor]], limit: int) -> None:
        self._read, self._limit, self._bytes = read, limit, 0
        self._kept: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()

    def __call__(self, key: str) -> Mapping[str, Tensor]:
        """As `read`."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = self._kept[key] = self._read(key)
        self._bytes += _size(found)
        while self._bytes > self._limit:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return found


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def expand(repeats: Sequence[int]) -> list[int]:
    """Each index as often as it is repeated: `[2, 1]` gives `[0, 0, 1]`."""
    return [index for index, times in enumerate(repeats) for _ in range(times)]
