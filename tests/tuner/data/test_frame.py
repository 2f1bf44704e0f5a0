"""What a model is told of each picture's cut is the cut: who makes it again from that alone has the encoded pixels."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tuner.data.augment import Augment
from tuner.data.buckets import Buckets, Crop, centre_crop, room
from tuner.data.cache import Cache
from tuner.data.captions import Captions
from tuner.data.images import Pictures, to_pixels
from tuner.data.order import Order
from tuner.data.sources.dreambooth import Dreambooth
from tuner.data.stream import DataStream, expand
from tuner.data.variants import variant
from tuner.diffusion.batch import Batch
from tuner.diffusion.model import LatentDistribution
from tuner.training.run import prepare
from tuner.training.watchers import quiet

BUCKETS = Buckets(resolution=48, step=8)
PICTURES = 1000


def noise(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def cut_again(picture: Image.Image, frame: list[int], flip: bool) -> Tensor:
    """The cut that `frame` tells of: by Pillow alone, and nothing of the project.

    The scaled picture has `down` x `across` whole pixels; of a mirrored one the cut is told as it lies in its mirror
    image, so it lies as far from the other side.
    """
    height, width, top, left, target_height, target_width = frame
    assert picture.size == (width, height)
    scale = max(target_width / width, target_height / height)
    if flip:
        left = int(width * scale + 1e-6) - target_width - left
    box = (left / scale, top / scale, (left + target_width) / scale, (top + target_height) / scale)
    box = (*box[:2], min(box[2], width), min(box[3], height))
    cut = picture.resize((target_width, target_height), Image.Resampling.LANCZOS, box=box)
    values = np.array(ImageOps.mirror(cut) if flip else cut)
    return torch.from_numpy(values).permute(2, 0, 1).float() / 127.5 - 1


def test_cutting_again_by_the_frame_gives_exactly_the_encoded_pixels():
    rng = np.random.default_rng(0)
    cuts: set[str] = set()
    for index in range(PICTURES):
        size = (int(rng.integers(20, 130)), int(rng.integers(20, 130)))
        bucket = BUCKETS.nearest(size) if index % 2 else BUCKETS.sizes[int(rng.integers(len(BUCKETS.sizes)))]
        right, down = room(size, bucket)
        crop = Crop(size, bucket, int(rng.integers(right + 1)), int(rng.integers(down + 1)))
        flip = bool(rng.integers(2))
        picture = noise(rng, size)
        frame = list(crop.frame(flip))
        assert torch.equal(cut_again(picture, frame, flip), to_pixels(picture, crop, flip)), (crop, flip)
        assert min(frame) >= 0
        cuts |= {f"{axis} {flip}" for axis, offset in (("left", frame[3]), ("top", frame[2])) if offset}
    assert cuts == {"left True", "left False", "top True", "top False"}


def test_cutting_a_variant_again_by_its_frame_gives_exactly_its_pixels():
    """Of the changed picture, where it is changed: of its size, too, the frame tells."""
    rng = np.random.default_rng(3)
    cut: set[bool] = set()
    for index in range(PICTURES):
        augment = Augment(contrast=0.2, hue=20, rotation=15) if index % 4 == 0 else Augment()
        pictures = Pictures(crop="centre" if index % 8 == 0 else "random", augment=augment)
        size = (int(rng.integers(20, 130)), int(rng.integers(20, 130)))
        of = variant(pictures, size, BUCKETS.nearest(size), str(index), int(rng.integers(4)))
        picture, flip = noise(rng, size), bool(rng.integers(2))
        changed = picture if of.change is None else of.change.picture(picture)
        again = cut_again(changed, list(of.crop.frame(flip)), flip)
        assert torch.equal(again, of.pixels(picture, flip)), (of, flip)
        cut.add(of.crop == centre_crop(changed.size, of.crop.bucket))
    assert cut == {True, False}


@pytest.mark.parametrize("wrong", ["axes", "flip", "size"])
def test_a_wrong_frame_would_be_seen(wrong):
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(50):
        size = (int(rng.integers(60, 130)), int(rng.integers(20, 50)))
        crop = Crop(size, (48, 48), int(rng.integers(room(size, (48, 48))[0] + 1)), 0)
        height, width, top, left, *target = crop.frame(wrong == "flip")
        if wrong == "axes":
            frame = [height, width, left, top, *target]
        elif wrong == "flip":  # as if it were not mirrored
            frame = [height, width, top, crop.left, *target]
        else:  # as published trainers have it: the scaled picture's size
            frame = [48, round(width * 48 / height), top, left, *target]
        picture = noise(rng, size)
        try:
            again = cut_again(picture, frame, wrong == "flip")
        except (AssertionError, ValueError):  # beyond the picture
            seen += 1
            continue
        seen += not torch.equal(again, to_pixels(picture, crop, wrong == "flip"))
    assert seen > 40


def test_a_mirrored_pictures_frame_is_that_of_its_mirror_image():
    """Where it is scaled to whole pixels: its mirror image, cut as told, shows what was encoded, but for rounding."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        wide = int(rng.integers(49, 120))
        picture = noise(rng, (2 * wide, 96))
        crop = Crop(picture.size, (48, 48), int(rng.integers(wide - 47)), 0)
        mirrored = ImageOps.mirror(picture)
        told = list(crop.frame(flip=True))
        apart = (cut_again(mirrored, told, flip=False) - to_pixels(picture, crop, flip=True)).abs().max()
        assert float(apart) <= 1.01 / 127.5


class Transparent:
    """A model whose latents are the pixels, so that what a batch holds is what was encoded."""

    resolution, resolution_step, max_tokens, text_encoders = 48, 8, 75, ("text_encoder",)
    guide = None
    captioned = True

    def __init__(self) -> None:
        self.encoded = 0

    def encode_images(self, pixels: Tensor) -> LatentDistribution:
        self.encoded += len(pixels)
        return LatentDistribution(pixels, torch.zeros_like(pixels))

    def fingerprint(self, component: str) -> str:
        return component


@pytest.fixture
def subject_and_class(tmp_path: Path) -> Dreambooth:
    """Subject and class pictures of sizes that none of the others has."""
    rng = np.random.default_rng(2)
    for name, sizes in (("subject", range(50, 62, 2)), ("class", range(91, 103, 2))):
        (tmp_path / name).mkdir()
        for index, side in enumerate(sizes):
            noise(rng, (side + 3 * index, side + 13 - 5 * index)).save(tmp_path / name / f"{name}-{index}.png")
    return Dreambooth(
        subject=tmp_path / "subject",
        prompt="a sks robot",
        class_folder=tmp_path / "class",
        class_prompt="a robot",
        class_count=6,
    )


def batches(model: Any, source: Dreambooth, pictures: Pictures, cache: Path) -> tuple[DataStream, list[Batch]]:
    encoded = prepare(model, source.examples(), pictures, Cache(cache), Captions())
    encoded = replace(encoded, text_encoder=None)
    encoded.fill_latents(model, encoded.missing_latents(), quiet)
    samples = expand([example.repeats for example in encoded.examples])
    stream = DataStream(
        model=model,
        encoded=encoded,
        captions=Captions(),
        order=Order(buckets=tuple(encoded.sizes[i] for i in samples), seed=7, batch_size=4),
        micro_batch=4,
        rank=0,
        world=1,
        device=torch.device("cpu"),
        learns_text=True,
    )
    return stream, [micro for batch in islice(stream(0), 12) for micro in batch.micro_batches]


@pytest.mark.parametrize(
    "more",
    [{}, {"crop": "random", "variants": 3}, {"crop": "random", "resolution": (32, 48), "areas": "each"}],
    ids=["centre", "random", "areas"],
)
def test_every_picture_of_a_run_is_told_with_its_own_size_and_cut_class_pictures_too(
    more: Any, subject_and_class, tmp_path: Path
):
    pictures = Pictures(**{"resolution": 48, "flip": True, **more})
    model = Transparent()
    told: list[list[Any]] = []
    for run in ("encoding", "from the cache"):
        before = model.encoded
        stream, shown = batches(model, subject_and_class, pictures, tmp_path / "cache")
        assert (model.encoded > before) == (run == "encoding")
        seen: set[tuple[str, bool]] = set()
        for micro in shown:
            assert micro.frame is not None and micro.frame.dtype == torch.float32
            for pixels, frame, at in zip(micro.latents, micro.frame, micro.positions, strict=True):
                example = stream.encoded.examples[stream.samples[at.sample]]
                numbers = [int(number) for number in frame.tolist()]
                with Image.open(example.image) as picture:
                    found = {flip: torch.equal(cut_again(picture, numbers, flip), pixels) for flip in (False, True)}
                assert sum(found.values()) == 1, example.image
                seen.add((example.source, found[True]))
        assert seen == {(source, flip) for source in ("subject", "class") for flip in (False, True)}
        cuts = {tuple(frame) for micro in shown if micro.frame is not None for frame in micro.frame.tolist()}
        assert (len(cuts) > 24) == bool(more)  # of 12 pictures, mirrored or not
        told.append([(micro.positions, micro.frame.tolist()) for micro in shown if micro.frame is not None])
    assert told[0] == told[1]
