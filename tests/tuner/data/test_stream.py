"""The same showings, whichever way they are read."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tuner.data.buckets import Buckets, Crop, room
from tuner.data.cache import Cache
from tuner.data.captions import Captions
from tuner.data.images import Pictures, load_picture, to_pixels
from tuner.data.order import Order
from tuner.data.sources.folder import PictureFolder
from tuner.data.stream import DataStream, Recent, expand
from tuner.data.variants import flip_at
from tuner.diffusion.batch import Batch, GlobalBatch
from tuner.errors import DataError
from tuner.families.source import BaseModel
from tuner.rng import Position
from tuner.training.run import prepare
from tuner.training.watchers import quiet

PICTURES = Pictures(resolution=64, flip=True)
CAPTIONS = Captions(dropout=0.3, prefix="photo of ")
SIZES = [(64, 64), (128, 64), (80, 80), (64, 100)]


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return BaseModel(base=str(base)).open(torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for index, size in enumerate(SIZES):
        values = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"the {index}, red, blue")
    return folder


def stream(
    model: Any,
    data: Path,
    captions: Captions = CAPTIONS,
    pictures: Pictures = PICTURES,
    batch: int = 3,
    micro: int = 3,
    rank: int = 0,
    world: int = 1,
    repeats: int = 1,
    cached: bool = True,
    learns_text: bool = False,
) -> DataStream:
    examples = PictureFolder(path=data, repeats=repeats, weight=0.5).examples()
    encoded = prepare(model, examples, pictures, Cache(data / ".cache"), captions)
    encoded.fill_latents(model, encoded.missing_latents(), quiet)
    if encoded.text_encoder is not None:
        texts = [text for example in examples for text in captions.variants(example.caption) or ()]
        encoded.fill_texts(model, encoded.missing_texts(texts), quiet)
    samples = expand([example.repeats for example in examples])
    return DataStream(
        model=model,
        encoded=encoded if cached else replace(encoded, text_encoder=None),
        captions=captions,
        order=Order(buckets=tuple(encoded.sizes[i] for i in samples), seed=7, batch_size=batch),
        micro_batch=micro,
        rank=rank,
        world=world,
        device=torch.device("cpu"),
        learns_text=learns_text,
    )


def take(stream: DataStream, updates: int, samples_seen: int = 0) -> list[GlobalBatch]:
    return list(islice(stream(samples_seen), updates))


def showings(batches: list[GlobalBatch]) -> dict[Position, tuple[str, torch.Tensor, torch.Tensor | None, float]]:
    """What is shown at each position."""
    micros: list[Batch] = [micro for batch in batches for micro in batch.micro_batches]
    return {
        at: (
            micro.captions[i],
            micro.latents[i],
            None if micro.conditioning is None else micro.conditioning.tokens[i],
            float(micro.weight[i]),
        )
        for micro in micros
        for i, at in enumerate(micro.positions)
    }


def same(one: Any, other: Any) -> bool:
    if one.keys() != other.keys():
        return False
    return all(
        a[0] == b[0]
        and torch.equal(a[1], b[1])
        and (a[2] is b[2] is None or (a[2] is not None and torch.allclose(a[2], b[2], atol=1e-5)))
        and a[3] == b[3]
        for a, b in ((one[at], other[at]) for at in one)
    )


def test_cached_captions_are_those_that_would_be_encoded_live(model, data):
    cached, live = (showings(take(stream(model, data, cached=cached), 20)) for cached in (True, False))
    assert {caption for caption, *_ in cached.values()} == {"", *(f"photo of the {i}, red, blue" for i in range(4))}
    assert same(cached, live)


def test_a_shuffled_caption_is_encoded_as_it_is_shown(model, data):
    shown = showings(take(stream(model, data, Captions(shuffle=True, keep=1)), 6))
    assert len({caption for caption, *_ in shown.values()}) > 4
    for caption, _, tokens, _ in shown.values():
        with torch.no_grad():
            assert tokens is not None and torch.allclose(tokens, model.encode_text([caption]).tokens[0], atol=1e-5)


def test_where_a_text_encoder_learns_only_the_captions_are_given(model, data):
    shown = showings(take(stream(model, data, learns_text=True), 6))
    assert all(tokens is None for _, _, tokens, _ in shown.values())
    assert {at: row[0] for at, row in shown.items()} == {
        at: row[0] for at, row in showings(take(stream(model, data), 6)).items()
    }


@pytest.mark.parametrize("split", [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_what_is_shown_does_not_depend_on_the_split(model, data, split):
    world, micro = split
    whole = take(stream(model, data, batch=5, micro=5), 8)
    parts = [take(stream(model, data, batch=5, micro=micro, rank=rank, world=world), 8) for rank in range(world)]
    assert same(showings([batch for part in parts for batch in part]), showings(whole))
    for batches in (*parts, whole):
        assert {(batch.samples, batch.weight) for batch in batches} == {(5, 2.5)}
        assert all(batch.micro_batches for batch in batches)


def test_starting_late_shows_what_would_have_come(model, data):
    unbroken = take(stream(model, data), 9)
    assert same(showings(take(stream(model, data), 4, samples_seen=15)), showings(unbroken[5:]))


def test_repeats_are_samples_of_their_own(model, data):
    repeated = stream(model, data, repeats=3, batch=12)
    shown = showings(take(repeated, 1))
    assert sorted(at.sample for at in shown) == list(range(12))
    names = sorted(repeated.name_of(at.sample) for at in shown)
    assert names == [str(data / f"{i}.png") for i in range(4) for _ in range(3)]
    latents = [row[1] for at, row in shown.items() if repeated.samples[at.sample] == 0]
    assert len(latents) == 3 and not torch.equal(latents[0], latents[1])  # each is drawn anew


def test_latents_are_drawn_from_the_autoencoders_distribution(model, data):
    plain = Pictures(resolution=64)
    drawn = stream(model, data, pictures=plain, batch=4)
    mean, std = drawn.encoded.latents(0, False)
    found = torch.stack([row[1] for at, row in showings(take(drawn, 400)).items() if at.sample == 0])
    assert len(found) == 400
    normal = (found - mean) / std
    assert float(normal.mean()) == pytest.approx(0, abs=0.02) and float(normal.std()) == pytest.approx(1, abs=0.02)
    middle = stream(model, data, pictures=replace(plain, latents="mean"), batch=4)
    assert all(torch.equal(row[1], mean) for at, row in showings(take(middle, 3)).items() if at.sample == 0)


def test_half_of_the_showings_are_mirrored(model, data):
    flipping = stream(model, data, pictures=replace(PICTURES, latents="mean"), batch=4)
    both = [flipping.encoded.latents(0, flip)[0] for flip in (False, True)]
    found = [row[1] for at, row in showings(take(flipping, 400)).items() if at.sample == 0]
    mirrored = sum(torch.equal(latents, both[1]) for latents in found)
    assert mirrored + sum(torch.equal(latents, both[0]) for latents in found) == 400
    assert 150 < mirrored < 250


def test_an_entry_that_vanishes_ends_the_run_and_no_thread_is_left(model, data):
    broken = stream(model, data, batch=4)
    broken = replace(broken, encoded=replace(broken.encoded, cache=Cache(data / "nowhere")))
    batches = broken(0)
    with pytest.raises(DataError, match=r"run.cache: .*: gone or damaged since the run began; start it again"):
        next(batches)
    good = stream(model, data)(0)
    next(good)
    good.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_masks_lie_where_the_latents_lie(model, data, tmp_path):
    """Marks painted into picture and mask alike come out at the same places, cut and mirrored alike."""
    pictures, masks = tmp_path / "p", tmp_path / "m"
    pictures.mkdir(), masks.mkdir()
    for index, size in enumerate(SIZES):
        marks = np.zeros((size[1], size[0]), np.uint8)
        marks[size[1] // 4 : size[1] // 2, : size[0] // 3] = 255
        Image.fromarray(marks).convert("RGB").save(pictures / f"{index}.png")
        Image.fromarray(marks).save(masks / f"{index}.png")
    plain = stream(model, data)
    examples = PictureFolder(path=pictures, prompt="x", masks=masks).examples()
    encoded = prepare(model, examples, PICTURES, Cache(tmp_path / ".cache"), CAPTIONS)
    encoded.fill_latents(model, encoded.missing_latents(), quiet)
    flips: set[bool] = set()
    for batch in take(replace(plain, encoded=encoded, learns_text=True), 8):
        for micro in batch.micro_batches:
            assert micro.mask is not None and micro.mask.shape == (len(micro), 1, *micro.latents.shape[2:])
            for mask, latents, at in zip(micro.mask, micro.latents, micro.positions, strict=True):
                example = plain.samples[at.sample]
                flip = flip_at(PICTURES, at)
                flips.add(flip)
                picture = load_picture(examples[example].image, "white")
                pixels = to_pixels(picture, encoded.crops[example], flip)
                expected = torch.nn.functional.interpolate(pixels[None], latents.shape[1:], mode="area")[0, :1]
                off = (mask - (expected + 1) / 2).abs()  # at the marks' edges, where Lanczos rings
                assert float(off.max()) < 0.25 and float(off.mean()) < 0.02
    assert flips == {True, False}


def test_a_pictures_own_transparency_is_its_mask_where_asked_for(model, tmp_path):
    half = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 32, 64))
    half.save(tmp_path / "half.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    examples = PictureFolder(path=tmp_path, prompt="x").examples()
    for alpha in ("background", "mask"):
        pictures = replace(PICTURES, alpha=alpha)
        encoded = prepare(model, examples, pictures, Cache(tmp_path / ".cache"), CAPTIONS)
        found = [encoded.weights(i, False, (8, 8)) for i in range(2)]
        assert found[1] is None
        if alpha == "background":
            assert found[0] is None
        else:
            assert found[0] is not None and found[0][0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_cutting_by_the_frame_gives_exactly_the_pixels_that_were_encoded(seed, tmp_path):
    """Whoever is told size, cut and target finds the same pixels."""
    draw = np.random.default_rng(seed)
    for _ in range(40):
        size = tuple(int(n) for n in draw.integers(20, 400, 2))
        picture = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        bucket = Buckets(resolution=64, step=8).nearest(size)
        right, down = room(size, bucket)
        crop = Crop(size, bucket, int(draw.integers(right + 1)), int(draw.integers(down + 1)))
        height, width, top, left, target_height, target_width = crop.frame()
        again = Crop((width, height), (target_width, target_height), left, top)
        assert torch.equal(to_pixels(picture, again, flip=False), to_pixels(picture, crop, flip=False))


def test_as_many_texts_are_kept_as_fit_into_the_bytes_and_those_asked_for_last():
    read: list[str] = []

    def text(caption: str) -> dict[str, torch.Tensor]:
        read.append(caption)
        return {"tokens": torch.full((len(caption), 4), float(len(read))), "mask": torch.ones(len(caption))}

    recent = Recent(text, limit=5 * 4 * 10)  # ten letters' worth
    first = recent("aaaa")
    recent("bbbb")
    assert recent("aaaa") is first and read == ["aaaa", "bbbb"]
    recent("cccc")  # for which b has to go, that was not asked for since
    assert recent("aaaa") is first and read == ["aaaa", "bbbb", "cccc"]
    recent("bb"), recent("bbbb")
    assert read[3:] == ["bb", "bbbb"]  # 4 + 2 + 4: a is here still, c is not
    assert recent("aaaa") is first
    assert len(recent("d" * 11)["tokens"]) == 11 and len(recent("d" * 11)["tokens"]) == 11
    assert read[5:] == ["d" * 11] * 2  # too large to be kept, and nothing else is left either
    recent("aaaa")
    assert read[7:] == ["aaaa"]
