"""The base model's figures, on cases whose answer is known."""

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from tuner.base.evaluate import Pair, background, named, pairs_in, spread
from tuner.base.pictures import COLOURS


@pytest.mark.parametrize("colour", COLOURS)
def test_a_background_is_named_whatever_lies_on_it(colour):
    picture = Image.new("RGB", (64, 64), COLOURS[colour])
    picture.paste((250, 120, 0), (10, 0, 50, 64))  # reaches the frame above and below
    assert background(picture) == colour


def test_the_nearest_distinct_objects_are_ranked():
    training = torch.tensor([[0.0], [0.1], [1.0], [2.0], [3.0], [4.0], [5.0]])
    shown = ["cat", "cat", "dog", "key", "bus", "sun", "owl"]
    assert named(torch.tensor([[0.02]]), ["cat"], training, shown) == (1.0, 1.0)
    assert named(torch.tensor([[0.02]]), ["sun"], training, shown) == (0.0, 1.0)
    assert named(torch.tensor([[0.02]]), ["owl"], training, shown) == (0.0, 0.0)


def test_pairs_are_read_from_names_once_each_and_chosen_alike_each_time(tmp_path):
    for name in ("cat--red--0", "cat--red--1", "red-apple--blue--0"):
        (tmp_path / f"{name}.png").touch()
    pairs = pairs_in(tmp_path)
    assert pairs == [Pair("cat", "red"), Pair("red-apple", "blue")]
    assert [pair.caption for pair in pairs] == ["cat on a red background", "red apple on a blue background"]
    assert sorted(spread(pairs, 2), key=str) == pairs and spread(pairs, 2) == spread(pairs, 2)
