"""Every picture is shown exactly as often as its repeats say, however a run is split, stopped and gone on with."""

import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tuner.data.buckets import Buckets, in_each_area
from tuner.data.cache import Cache
from tuner.data.captions import Captions
from tuner.data.example import Example
from tuner.data.images import Pictures
from tuner.data.ledger import Ledger, times_seen
from tuner.data.order import Order, share
from tuner.data.sources.folder import PictureFolder
from tuner.data.stream import DataStream, expand
from tuner.data.variants import number_at
from tuner.diffusion.model import LatentDistribution
from tuner.rng import Position
from tuner.training.run import prepare
from tuner.training.watchers import quiet

SIZES = st.tuples(st.integers(20, 200), st.integers(20, 200))
BUCKETS = Buckets(resolution=64, step=8, smaller=Buckets(resolution=32, step=8))


@st.composite
def data(draw: st.DrawFn) -> list[Example]:
    """One to three sources of any repeats and weights, their pictures of any size, at one area or at each."""
    examples: list[Example] = []
    for source in range(draw(st.integers(1, 3))):
        repeats, weight = draw(st.integers(1, 4)), draw(st.sampled_from([0.25, 1.0, 3.0]))
        for index, size in enumerate(draw(st.lists(SIZES, min_size=1, max_size=12))):
            image = Path(f"{source}/{index}.png")
            examples.append(
                Example(image=image, size=size, caption="", repeats=repeats, weight=weight, source=f"source {source}")
            )
    return in_each_area(examples, BUCKETS) if draw(st.booleans()) else examples


SESSIONS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4)
"""Of a run that is stopped and gone on with: processes, the most of a micro-batch, and updates until it stops."""


def shown(order: Order, sessions: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Epoch and sample of all that the processes of all sessions were given, each knowing `samples_seen` alone."""
    found: list[tuple[int, int]] = []
    seen = 0
    for world, micro_batch, updates in sessions:
        world = min(world, order.batch_size)
        again = [replace(order) for _ in range(world)]  # a process of its own knows nothing of the others
        for rank, own in enumerate(again):
            for batch in islice(own.batches(seen), updates):
                for micro in share(batch, own.buckets, micro_batch, rank, world):
                    found += [(at.epoch, at.sample) for at in micro]
        seen += updates * order.batch_size
    return found


@given(data(), SESSIONS, st.integers(1, 12), st.integers(0, 3))
def test_every_sample_comes_once_an_epoch_however_the_run_is_split_and_stopped(examples, sessions, batch_size, seed):
    samples = expand([example.repeats for example in examples])
    order = Order(buckets=tuple(BUCKETS.of(examples[i]) for i in samples), seed=seed, batch_size=batch_size)
    found = shown(order, sessions)
    samples_seen = batch_size * sum(updates for *_, updates in sessions)
    assert len(found) == len(set(found)) == samples_seen
    whole, begun = divmod(samples_seen, len(samples))
    of_epoch = Counter(epoch for epoch, _ in found)
    assert of_epoch == Counter({epoch: len(samples) for epoch in range(whole)} | ({whole: begun} if begun else {}))

    seen = Counter(samples[sample] for _, sample in found)
    for index, example in enumerate(examples):
        assert example.repeats * whole <= seen[index] <= example.repeats * (whole + bool(begun))
    counted = times_seen(replace(order), samples_seen)
    assert Counter({i: int(n) for i, n in enumerate(counted) if n}) == Counter(sample for _, sample in found)


@given(data(), st.integers(0, 400), st.integers(1, 12))
def test_the_ledger_says_what_was_shown(examples, samples_seen, batch_size):
    samples = expand([example.repeats for example in examples])
    order = Order(buckets=tuple(BUCKETS.of(examples[i]) for i in samples), seed=1, batch_size=batch_size)
    line = [examples[samples[order.at(place).sample]] for place in range(samples_seen)]
    ledger = Ledger(examples, samples, times_seen(order, samples_seen))

    truth = Counter((example.source, str(example.image)) for example in line)
    lines = [ledger.line(i) for i in range(len(ledger.pictures))]
    assert {(of.source, of.name): of.seen for of in lines} == {
        (e.source, str(e.image)): truth[e.source, str(e.image)] for e in examples
    }
    a_time = Counter((examples[i].source, str(examples[i].image)) for i in samples)
    assert {(of.source, of.name): of.an_epoch for of in lines} == dict(a_time)
    for of in ledger.sources():
        seen = [line.seen for line in lines if line.source == of.source]
        assert (of.pictures, of.seen, of.showings) == (len(seen), (min(seen), max(seen)), sum(seen))
    assert sum(of.showings for of in ledger.sources()) == samples_seen
    numbers = sorted(of.seen for of in lines)
    assert [of.seen for of in ledger.least(3)] == numbers[:3]
    assert [of.seen for of in ledger.most(3)] == numbers[::-1][:3]


@given(st.integers(2, 7), st.integers(0, 5), st.integers(0, 30), st.integers(0, 9))
def test_in_as_many_epochs_as_there_are_variants_each_is_shown_once(variants, seed, sample, round_):
    pictures = Pictures(crop="random", variants=variants)
    epochs = range(round_ * variants, (round_ + 1) * variants)
    assert sorted(number_at(pictures, Position(seed, epoch, sample)) for epoch in epochs) == list(range(variants))


def test_variants_come_in_many_orders():
    pictures = Pictures(crop="random", variants=3)
    found = Counter(
        tuple(number_at(pictures, Position(seed, 3 * round_ + epoch, sample)) for epoch in range(3))
        for seed in range(4)
        for sample in range(30)
        for round_ in range(5)
    )
    assert len(found) == 6 and min(found.values()) > 60  # of 600, 100 each


def test_the_ledgers_memory_does_not_grow_with_the_run_and_is_small_for_each_picture(tmp_path: Path):
    count = 10_000
    examples = [Example(image=Path(f"{i}.png"), size=(64, 64), caption="", repeats=1 + i % 2) for i in range(count)]
    samples = expand([example.repeats for example in examples])
    order = Order(buckets=((64, 64),) * len(samples), seed=0, batch_size=8)
    at = 1000 * len(samples) + 7_777
    tracemalloc.start()
    ledger = Ledger(examples, samples, times_seen(order, at))
    ledger.write_csv(tmp_path / "seen.csv")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 600 * count
    with (tmp_path / "seen.csv").open() as file:
        rows = [line.rstrip().split(",") for line in file]
    assert len(rows) == count + 1 and sum(int(row[3]) for row in rows[1:]) == at
    assert all(1000 * int(row[2]) <= int(row[3]) <= 1001 * int(row[2]) for row in rows[1:])


# Through files, cache, and the stream itself


class Looking:
    """A model whose latents are the pixels, so that a batch says which picture it holds."""

    resolution, resolution_step, max_tokens, text_encoders = 64, 8, 75, ("text_encoder",)
    guide = None
    captioned = True

    def encode_images(self, pixels: Tensor) -> LatentDistribution:
        return LatentDistribution(pixels, torch.zeros_like(pixels))

    def fingerprint(self, component: str) -> str:
        return component


@pytest.mark.parametrize("areas", ["fitting", "each"])
def test_every_picture_comes_out_of_the_stream_as_often_as_the_ledger_says(areas, tmp_path: Path):
    """Pictures of one colour each, which says what they are, whatever becomes of them on the way."""
    rng = np.random.default_rng(0)
    examples: list[Example] = []
    for source, (count, repeats, weight) in {"a": (7, 1, 1.0), "b": (3, 2, 0.25)}.items():
        (tmp_path / source).mkdir()
        for index in range(count):
            size = (int(rng.integers(24, 120)), int(rng.integers(24, 120)))
            colour = (len(examples) * 5 + index * 20, 200 if source == "a" else 50, 10)
            Image.new("RGB", size, colour).save(tmp_path / source / f"{index}.png")
        folder = PictureFolder(path=tmp_path / source, prompt=source, repeats=repeats, weight=weight, source=source)
        examples += folder.examples()
    model: Any = Looking()
    pictures = Pictures(resolution=(32, 64), areas=areas, crop="random", variants=3, flip=True)
    encoded = prepare(model, examples, pictures, Cache(tmp_path / "cache"), Captions())
    encoded.fill_latents(model, encoded.missing_latents(), quiet)
    samples = expand([example.repeats for example in encoded.examples])
    order = Order(buckets=tuple(encoded.sizes[i] for i in samples), seed=7, batch_size=5)
    of_colour = {}
    for example in examples:
        with Image.open(example.image) as picture:
            of_colour[picture.getpixel((0, 0))] = example
    found: list[tuple[str, int]] = []
    seen = 0
    for world, micro_batch, updates in ((1, 5, 3), (3, 2, 4), (2, 1, 6)):
        for rank in range(world):
            stream = DataStream(
                model=model,
                encoded=replace(encoded),
                captions=Captions(),
                order=replace(order),
                micro_batch=micro_batch,
                rank=rank,
                world=world,
                device=torch.device("cpu"),
                learns_text=True,
            )
            for batch in islice(stream(seen), updates):
                for micro in batch.micro_batches:
                    for pixels, weight, caption in zip(micro.latents, micro.weight, micro.captions, strict=True):
                        colour = tuple(((pixels[:, 0, 0] + 1) * 127.5).round().int().tolist())
                        example = of_colour[colour]
                        assert (float(weight), caption) == (example.weight, example.source)
                        found.append((str(example.image), int(pixels.shape[1] * pixels.shape[2] > 1500)))
        seen += updates * 5
    assert seen == len(found) == 65
    ledger = Ledger(encoded.examples, samples, times_seen(order, seen))
    counts = Counter(name for name, _ in found)
    assert {of.name: of.seen for of in map(ledger.line, range(10))} == counts
    epochs, an_epoch = divmod(seen, len(samples)), Counter(str(encoded.examples[i].image) for i in samples)
    assert all(epochs[0] * an_epoch[name] <= n <= (epochs[0] + 1) * an_epoch[name] for name, n in counts.items())
    if areas == "each":  # and at each area about as often
        assert len(samples) == 26 and {name for name, large in found if large} == {name for name, _ in found}
        by_area = Counter(found)
        assert all(abs(by_area[name, 0] - by_area[name, 1]) <= an_epoch[name] // 2 for name in counts)
