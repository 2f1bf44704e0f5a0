"""Copies are found however they were saved, and different pictures are not taken for copies."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from tuner.data.example import Example
from tuner.data.lookalikes import Look, alike, groups, look
from tuner.data.split import split
from tuner.errors import DataError


def picture(seed: int, size: int = 200) -> Image.Image:
    """Some shapes on a background."""
    draw = np.random.default_rng(seed)
    made = Image.new("RGB", (size, size), tuple(int(v) for v in draw.integers(0, 256, 3)))
    for _ in range(6):
        x, y, w, h = (int(v) for v in draw.integers(0, size, 4))
        ImageDraw.Draw(made).ellipse((x, y, x + w // 2, y + h // 2), tuple(int(v) for v in draw.integers(0, 256, 3)))
    return made


def jpeg(made: Image.Image) -> Image.Image:
    written = io.BytesIO()
    made.save(written, "jpeg", quality=60)
    return Image.open(written).convert("RGB")


COPIES = {
    "the same": lambda made: made,
    "half as large": lambda made: made.resize((100, 100), Image.Resampling.LANCZOS),
    "saved with loss": jpeg,
    "a little brighter": lambda made: ImageEnhance.Brightness(made).enhance(1.02),
    "a few pixels changed": lambda made: (copy := made.copy(), copy.paste((255, 255, 255), (5, 5, 15, 15)))[0],
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("seed", range(8))
def test_a_copy_looks_like_its_original(how, seed):
    made = picture(seed)
    assert alike(look(made), look(COPIES[how](made)))


def test_pictures_of_different_things_do_not_look_alike():
    every = [look(picture(seed)) for seed in range(60)]
    every += [look(Image.new("RGB", (64, 64), colour)) for colour in ("red", "green", "white", "black", "#808080")]
    assert groups(every) == []


def test_the_same_shape_in_another_colour_is_another_picture():
    made = picture(3)
    red, green, blue = made.split()
    assert not alike(look(made), look(Image.merge("RGB", (blue, red, green))))


def test_groups_are_those_of_comparing_everything_with_everything():
    draw = np.random.default_rng(0)
    every: list[Look] = []
    for seed in range(12):
        made = look(picture(seed))
        every.append(made)
        for _ in range(3):
            bits = made.bits.copy()
            for bit in draw.choice(256, int(draw.integers(0, 20)), replace=False):
                bits[bit // 8] ^= 1 << (bit % 8)
            every.append(Look(bits, made.thumbnail))
    pairs = {(i, j) for i in range(len(every)) for j in range(i) if alike(every[i], every[j])}
    together = {(i, j) for group in groups(every) for i in group for j in group if j < i}
    assert pairs <= together
    reached = {i: {i} for i in range(len(every))}
    for i, j in pairs:
        whole = reached[i] | reached[j]
        for member in whole:
            reached[member] = whole
    assert together == {(i, j) for i in range(len(every)) for j in reached[i] if j < i}


def examples(count: int) -> tuple[list[Example], list[str]]:
    import hashlib

    made = [Example(image=Path(f"{i}.png"), size=(8, 8), caption="x") for i in range(count)]
    return made, [hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_the_share_is_held_out_and_nothing_is_lost(share):
    every, hashes = examples(2000)
    training, held = split(every, hashes, [], share)
    assert {e.image for e in training} | {e.image for e in held} == {e.image for e in every}
    assert len(training) + len(held) == 2000
    assert len(held) == pytest.approx(2000 * share, abs=4 * (2000 * share * (1 - share)) ** 0.5)


def test_a_pictures_side_stays_when_others_come_and_files_are_renamed():
    every, hashes = examples(100)
    _, held = split(every, hashes, [], 0.2)
    more, more_hashes = examples(150)
    _, again = split(more[::-1], more_hashes[::-1], [], 0.2)
    assert {e.image for e in held} == {e.image for e in again if int(e.image.stem) < 100}


def test_pictures_that_look_alike_are_on_one_side():
    every, hashes = examples(300)
    pairs = [[i, i + 1] for i in range(0, 300, 2)]
    training, held = split(every, hashes, pairs, 0.3)
    sides = {int(e.image.stem): side for side, of in enumerate((training, held)) for e in of}
    assert all(sides[i] == sides[j] for i, j in pairs) and len(held) > 40


def test_class_pictures_are_neither_held_out_nor_trained_on_where_they_show_what_is_held_out():
    every, hashes = examples(400)
    every = [replace(e, source="class" if i >= 100 else "subject") for i, e in enumerate(every)]
    alone = split(every[:100], hashes[:100], [], 0.3)[1]
    twins = [[i, i + 200] for i in range(50)]  # 300 and more are like no subject
    among_themselves = [[i, i + 1] for i in range(300, 400, 2)]
    training, held = split(every, hashes, [*twins, *among_themselves], 0.3)
    assert held == alone and 10 < len(held) < 90  # class pictures do not decide
    out = {int(e.image.stem) for e in held}
    gone = {i for i in range(400) if every[i] not in training} - out
    assert gone == {i + 200 for i in out if i < 50} and gone


def test_class_pictures_alone_are_nothing_to_train_on_or_to_hold_out():
    every, hashes = examples(40)
    every = [replace(e, source="class" if i else "subject") for i, e in enumerate(every)]
    for share in (1e-9, 1 - 1e-9):
        with pytest.raises(DataError, match=r"of 1 pictures (none|all) would be held out"):
            split(every, hashes, [], share)


@pytest.mark.parametrize(("count", "share"), [(1, 0.5), (3, 0.001), (3, 0.999)])
def test_an_empty_side_is_refused(count, share):
    with pytest.raises(DataError, match="would be held out"):
        split(*examples(count), [], share)
