"""Variants of pictures: cut anywhere, changed in colours and angle, and all that belongs to a picture alike."""

from dataclasses import fields, replace
from math import cos, radians, sin
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from tuner.data.augment import GREY, Augment, Change
from tuner.data.buckets import Buckets, room
from tuner.data.cache import Cache
from tuner.data.captions import Captions
from tuner.data.encode import Encoded
from tuner.data.images import Pictures, load_picture
from tuner.data.sources.folder import PictureFolder
from tuner.data.variants import number_at, variant
from tuner.rng import Position, generator_at
from tuner.training.run import prepare

ALL = Augment(brightness=0.3, contrast=0.4, saturation=0.5, hue=60, rotation=20)
FIELDS = [field.name for field in fields(Augment)]
SIZES = st.tuples(st.integers(20, 300), st.integers(20, 300))


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


# Cuts


@given(SIZES, st.integers(0, 10**6), st.integers(2, 12))
def test_cuts_lie_in_the_picture_and_evenly_over_it(size, picture, count):
    bucket = Buckets(resolution=64, step=8).nearest(size)
    pictures = Pictures(crop="random", variants=count)
    crops = [variant(pictures, size, bucket, str(picture), number).crop for number in range(count)]
    right, down = room(size, bucket)
    assert all(0 <= crop.left <= right and 0 <= crop.top <= down for crop in crops)
    span = max(right, down) + 1
    if span < 4 * count:
        return
    places = sorted((crop.left if right > down else crop.top) / span for crop in crops)
    gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + 1], strict=True)]
    assert 0.3 / count < min(gaps) + 1 / span and max(gaps) < 2.2 / count + 1 / span


def test_over_many_pictures_cuts_are_as_likely_anywhere():
    pictures = Pictures(crop="random")
    for number in range(3):
        lefts = [variant(pictures, (104, 64), (64, 64), str(i), number).crop.left for i in range(4000)]
        counts = np.bincount(lefts, minlength=41)
        assert counts.shape == (41,) and counts.min() > 50 and counts.max() < 150  # about 98 each


def test_more_variants_leave_the_first_ones_as_they_are():
    few, many = (Pictures(crop="random", augment=ALL, variants=count) for count in (3, 30))
    for number in range(3):
        assert variant(few, (90, 70), (64, 64), "a", number) == variant(many, (90, 70), (64, 64), "a", number)


def test_without_crop_and_augment_there_is_one_variant_and_it_is_the_middle():
    plain = Pictures()
    assert variant(plain, (90, 70), (64, 64), "", 0).crop.left == room((90, 70), (64, 64))[0] // 2
    assert {number_at(plain, Position(0, epoch, 1)) for epoch in range(9)} == {0}
    varied = Pictures(flip=True, crop="random", augment=ALL, variants=9)
    assert varied.plain == plain and varied.varied and not plain.varied


# Colours


@given(st.integers(0, 10**6))
def test_changes_are_drawn_within_their_bounds_and_each_by_itself(seed):
    change = ALL.draw(generator_at(seed))
    for name in FIELDS:
        rest = getattr(Change(), name)
        assert abs(getattr(change, name) - rest) <= getattr(ALL, name)
        alone = Augment(**{name: getattr(ALL, name)}).draw(generator_at(seed))
        assert getattr(alone, name) == getattr(change, name)
        assert all(getattr(alone, other) == getattr(Change(), other) for other in FIELDS if other != name)


def test_changes_go_both_ways_and_as_far_as_they_may():
    drawn = [ALL.draw(generator_at(seed)) for seed in range(300)]
    for name in FIELDS:
        far = np.array([getattr(change, name) - getattr(Change(), name) for change in drawn]) / getattr(ALL, name)
        assert far.min() < -0.95 and far.max() > 0.95 and abs(far.mean()) < 0.1


def test_colours_are_changed_as_their_names_say():
    picture = noise((40, 30))
    values = np.asarray(picture, np.float64)

    def changed(**what: float) -> Any:
        return np.asarray(Change(**what).picture(picture), np.float64)

    assert Change().picture(picture) is picture
    assert np.abs(changed(brightness=0.8) - values * 0.8).max() <= 0.5001
    enhanced = np.asarray(ImageEnhance.Brightness(picture).enhance(1.3), np.float64)
    assert np.abs(changed(brightness=1.3) - enhanced).max() <= 1
    assert np.abs(changed(contrast=0.5) - (GREY + (values - GREY) / 2)).max() <= 0.5001
    grey = changed(saturation=0)
    assert np.ptp(grey, axis=2).max() == 0
    assert np.abs(changed(saturation=0.5) - (values + grey) / 2).max() <= 1
    both = changed(brightness=0.9, contrast=0.7)
    assert np.abs(both - 0.9 * (GREY + (values - GREY) * 0.7)).max() <= 0.5001


@given(st.floats(-180, 180), st.floats(0, 2), st.integers(0, 255))
def test_hue_and_saturation_leave_greys_and_brightness_as_they_are(hue, saturation, level):
    matrix = Change(hue=hue, saturation=saturation).colours
    grey = matrix @ [level, level, level, 1]
    assert grey == pytest.approx([level] * 3, abs=0.02 * level / 255 + 1e-9)
    if saturation == 1:
        luma = np.array([0.213, 0.715, 0.072])
        assert luma @ matrix[:, :3] == pytest.approx(luma, abs=2e-3)


def test_hues_turn_on_a_circle():
    """Two turns are one by the sum of their angles; a whole turn is none; red becomes greenish, then bluish."""
    one, other, both, back = (Change(hue=angle).colours[:, :3] for angle in (50, 75, 125, 180))
    assert one @ other == pytest.approx(both, abs=5e-3) and back @ back == pytest.approx(np.eye(3), abs=5e-3)
    red = np.array([1.0, 0, 0])
    assert np.argmax(Change(hue=120).colours[:, :3] @ red) == 1
    assert np.argmax(Change(hue=-120).colours[:, :3] @ red) == 2


# Angle


@given(SIZES, st.floats(-45, 45))
def test_no_corner_of_a_turned_picture_is_empty_and_no_more_is_cut_than_has_to_be(size, rotation):
    change = Change(rotation=rotation)
    white = Image.new("RGB", size, "white")
    turned = change.picture(white)
    assert turned.size == change.size(size)
    assert np.asarray(turned).min() == 255
    assert np.asarray(change.turn(Image.new("L", size, 255))).min() == 255
    width, height = turned.size
    assert abs(width / height - size[0] / size[1]) < 2 * max(size) / min(size) / min(turned.size)
    a, larger = radians(abs(rotation)), (width + 2 * max(1, size[0] / size[1]), height + 2 * max(1, size[1] / size[0]))
    across = larger[0] * cos(a) + larger[1] * sin(a), larger[0] * sin(a) + larger[1] * cos(a)
    assert across[0] > size[0] or across[1] > size[1]


def test_turning_is_what_pillow_turns_about_the_middle():
    smooth = noise((12, 9)).resize((120, 90), Image.Resampling.BICUBIC)
    exact = 0
    for rotation in range(-44, 45, 4):
        turned = Change(rotation=rotation).picture(smooth)
        width, height = turned.size
        whole = smooth.rotate(rotation, Image.Resampling.BICUBIC)
        left, top = (120 - width) // 2, (90 - height) // 2
        theirs = whole.crop((left, top, left + width, top + height))
        if (width % 2, height % 2) == (0, 0):  # else theirs is half a pixel beside
            exact += 1
            assert np.abs(np.asarray(turned, float) - np.asarray(theirs, float)).max() <= 1
    assert exact > 3


# All that belongs to a picture


def marked(folder: Path, size: tuple[int, int], colour: str = "white") -> Image.Image:
    """Two blocks, away from the middle and unlike each other."""
    picture = Image.new("RGB", size, "black")
    width, height = size
    picture.paste(colour, (width // 4, height // 4, width // 2, height // 2))
    picture.paste(colour, (width // 2, height // 2, width * 3 // 4, height * 5 // 8))
    folder.mkdir(exist_ok=True)
    return picture


@pytest.fixture
def encoded(tmp_path: Path) -> Encoded:
    """Pictures, masks and guides with the same marks, in variants of every kind but those of colour."""
    for index, size in enumerate([(200, 120), (90, 160), (128, 128)]):
        for name in ("pictures", "masks", "guides"):
            marked(tmp_path / name, size).save(tmp_path / name / f"{index}.png")
    examples = PictureFolder(
        path=tmp_path / "pictures", prompt="x", masks=tmp_path / "masks", guides=tmp_path / "guides"
    ).examples()
    model: Any = Silent()
    pictures = Pictures(resolution=64, flip=True, crop="random", augment=Augment(rotation=25), variants=5)
    return prepare(model, examples, pictures, Cache(tmp_path / "cache"), Captions())


def pixels_of(encoded: Encoded, example: int, flip: bool, number: int) -> torch.Tensor:
    """What the autoencoder gets."""
    return encoded._pixels(example, flip, number, lambda file: load_picture(file, "white"))


class Silent:
    """A model that is told depth maps; nothing is asked of it but what it is."""

    resolution, resolution_step, text_encoders, guide = 64, 8, (), "depth"
    captioned = True

    def fingerprint(self, component: str) -> str:
        return component


def test_masks_and_guides_are_cut_and_turned_as_their_picture_is(encoded: Encoded):
    at = Position(0, 0, 0)
    seen: set[tuple[float, int]] = set()
    for example in range(3):
        for number in range(5):
            of = encoded.variant(example, number)
            assert of.change is not None
            seen.add((of.change.rotation, of.crop.left + of.crop.top))
            for flip in (False, True):
                pixels = (pixels_of(encoded, example, flip, number)[:1] + 1) / 2
                size = (pixels.shape[2], pixels.shape[1])
                mask = encoded.weights(example, flip, size, number)
                depth = encoded.guide("depth", example, flip, at, number) / 255
                edit = (encoded.guide("picture", example, flip, at, number)[:1] + 1) / 2
                paint = encoded.guide("mask", example, flip, at, number)
                assert mask is not None and torch.equal(edit, pixels) and torch.equal((paint[1:2] + 1) / 2, pixels)
                for other in (mask, depth, paint[:1]):
                    off = (other - pixels).abs()
                    assert float(off.mean()) < 0.02 and float((off > 0.5).float().mean()) < 0.005
                assert 0.03 < float(pixels.mean()) < 0.5  # there is something to see
    assert len(seen) == 15


def test_of_an_edit_both_pictures_have_their_colours_changed_alike(tmp_path: Path):
    noise((90, 90), 1).save(tmp_path / "0.png")
    (tmp_path / "before").mkdir()
    noise((90, 90), 1).save(tmp_path / "before" / "0.png")
    folder = PictureFolder(path=tmp_path / "after", prompt="x", guides=tmp_path / "before")
    (tmp_path / "after").mkdir()
    noise((90, 90), 1).save(tmp_path / "after" / "0.png")
    model: Any = Silent()
    pictures = Pictures(resolution=64, augment=ALL)
    encoded = prepare(model, folder.examples(), pictures, Cache(tmp_path / "cache"), Captions())
    for number in range(4):
        pixels = pixels_of(encoded, 0, False, number)
        assert torch.equal(encoded.guide("picture", 0, False, Position(0, 0, 0), number), pixels)
        plain = pixels_of(replace(encoded, pictures=pictures.plain), 0, False, 0)
        assert not torch.equal(pixels, plain)
    assert len({encoded.latents_address(0, False, number) for number in range(4)}) == 4


def test_variants_without_colours_and_angle_are_the_picture_itself(tmp_path: Path):
    noise((64, 64)).save(tmp_path / "0.png")
    of = variant(Pictures(crop="random"), (64, 64), (64, 64), "a", 1)
    assert of.change is None
    picture = load_picture(tmp_path / "0.png", "white")
    assert np.array_equal(((of.pixels(picture, False) + 1) * 127.5).round().permute(1, 2, 0), np.asarray(picture))


@pytest.mark.parametrize("name", FIELDS)
def test_what_no_picture_can_be_is_refused(name):
    for value in (-0.1, 181.0):
        with pytest.raises(ValueError, match=rf"^{name} must lie in \[0, \d+\]"):
            Augment(**{name: value})
