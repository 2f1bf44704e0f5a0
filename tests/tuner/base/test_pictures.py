"""The base model's data set is a pure function of names."""

import itertools
import json

import pytest

pytest.importorskip("resvg_py")

from tuner.base import pictures

DISC = '<circle cx="64" cy="64" r="50" fill="#0000ff"/>'


def test_every_object_has_one_name_of_its_own():
    shown, unseen = pictures.objects()["shown"], pictures.objects()["unseen"]
    names = [pictures.object_name(icon) for icon in (*shown, *unseen)]
    assert len(set(names)) == len(names)
    assert "robot" in unseen


def test_captions_name_the_object_and_the_background():
    assert pictures.caption("red-apple", "blue") == "red apple on a blue background"
    assert pictures.caption("dog-face", "white") == "dog on a white background"


def test_background_colours_are_far_apart():
    for one, other in itertools.combinations(pictures.COLOURS.values(), 2):
        assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) > 80**2


def test_about_one_pair_in_eight_is_held_out_and_each_object_keeps_most_of_its_colours():
    shown = pictures.objects()["shown"]
    held = [[pictures.held_out(icon, colour) for colour in pictures.COLOURS] for icon in shown]
    share = sum(map(sum, held)) / len(shown) / len(pictures.COLOURS)
    assert 0.1 < share < 0.15
    assert max(map(sum, held)) <= 4


def test_a_drawing_is_placed_on_its_colour_and_drawn_alike_twice(tmp_path):
    (tmp_path / "icons.json").write_text(json.dumps({"icons": {"disc": {"body": DISC}}}))
    icons = pictures.Icons(tmp_path)
    place = pictures.placement("disc", "red", 1)
    one, other = (icons.draw("disc", place, pictures.COLOURS["red"]) for _ in range(2))
    assert one.tobytes() == other.tobytes()
    assert one.size == (128, 128) and one.getpixel((0, 0)) == pictures.COLOURS["red"]
    assert one.getpixel((64, 64)) == (0, 0, 255)


def test_a_drawing_in_the_colour_of_its_background_is_camouflaged(tmp_path):
    (tmp_path / "icons.json").write_text(json.dumps({"icons": {"disc": {"body": DISC}}}))
    cutout = pictures.Icons(tmp_path).draw("disc", pictures.Placement(scale=1.0, right=0, down=0), None)
    assert pictures.camouflaged(cutout, (0, 0, 250))
    assert not pictures.camouflaged(cutout, (250, 0, 0))
