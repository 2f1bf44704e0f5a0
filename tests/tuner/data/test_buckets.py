from math import log
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tuner.data.buckets import Buckets, centre_crop, default_step, in_each_area
from tuner.data.example import Example

SIDES = st.integers(1, 5000)
PICTURES = st.tuples(SIDES, SIDES)


@st.composite
def buckets(draw: st.DrawFn) -> Buckets:
    step = draw(st.sampled_from([8, 16, 24, 64]))
    return Buckets(resolution=step * draw(st.integers(1, 16)), step=step, max_ratio=draw(st.floats(1, 4)))


@given(buckets())
def test_sizes_are_multiples_of_the_step_within_area_and_ratio_with_the_square_and_every_mirror(buckets):
    sizes = buckets.sizes
    assert (buckets.resolution, buckets.resolution) in sizes
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % buckets.step == height % buckets.step == 0
        assert max(width, height) / min(width, height) <= buckets.max_ratio
        assert width * height <= buckets.resolution**2 < (min(width, height) + buckets.step) * max(width, height)


def test_the_sizes_of_stable_diffusion_1_are_the_well_known_ones():
    assert Buckets(resolution=512, step=64).sizes == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]


@given(buckets(), PICTURES)
def test_the_nearest_bucket_is_so_by_the_ratio_of_ratios(buckets, picture):
    def distance(bucket: tuple[int, int]) -> float:
        return abs(log(bucket[0] / bucket[1]) - log(picture[0] / picture[1]))

    assert distance(buckets.nearest(picture)) <= min(map(distance, buckets.sizes)) + 1e-12


def test_ratios_are_not_told_apart_by_their_difference():
    """1.45 is nearer to 2 than to 1 by ratio (2 / 1.45 < 1.45), and farther by difference."""
    buckets = Buckets(resolution=48, step=16)
    assert buckets.sizes == [(32, 64), (48, 48), (64, 32)]
    assert buckets.nearest((1450, 1000)) == (64, 32)
    assert buckets.nearest((1000, 1450)) == (32, 64)


@given(buckets(), PICTURES)
def test_a_turned_picture_gets_the_turned_bucket(buckets, picture):
    width, height = buckets.nearest(picture)
    assert buckets.nearest((picture[1], picture[0])) == (height, width)


@given(buckets(), PICTURES)
@example(Buckets(resolution=80, step=8), (225, 450))  # rounds below zero, which Pillow refuses
def test_a_crop_lies_in_the_middle_of_its_picture_and_has_the_buckets_shape(buckets, picture):
    bucket = buckets.nearest(picture)
    crop = centre_crop(picture, bucket)
    left, top, right, bottom = crop.box
    assert crop.bucket == bucket
    assert 0 <= left < right <= picture[0] and 0 <= top < bottom <= picture[1]
    assert (right - left) / (bottom - top) == pytest.approx(bucket[0] / bucket[1], rel=1e-6)
    whole = 2 / crop.scale  # cuts are at whole pixels of the scaled picture
    assert abs(left - (picture[0] - right)) < whole and abs(top - (picture[1] - bottom)) < whole
    assert left == 0 or top == 0  # nothing is cut twice


def test_a_wide_picture_loses_its_sides_and_a_tall_one_top_and_bottom():
    assert centre_crop((400, 100), (64, 32)).box == (100, 0, 300, 100)
    assert centre_crop((100, 400), (32, 64)).box == (0, 100, 100, 300)


@given(buckets(), PICTURES)
def test_a_mirrored_pictures_frame_is_that_of_its_mirror_image(buckets, picture):
    """Mirrored and cut where the frame says, a picture shows what the cut shows, mirrored."""
    crop = centre_crop(picture, buckets.nearest(picture))
    height, width, top, left, down, across = crop.frame(flip=True)
    assert (width, height) == picture and (across, down) == crop.bucket and top == crop.top
    cut_off = round(picture[0] * crop.scale) - across
    assert abs(left + crop.left - cut_off) <= 1 and left >= 0


@given(st.integers(1, 2048), st.sampled_from([1, 4, 8, 16]))
def test_the_default_step_suits_every_resolution_that_the_model_takes(resolution, multiple):
    step = default_step(resolution, multiple)
    assert step % multiple == 0 and step <= max(64, multiple)
    if resolution % multiple == 0:
        assert (resolution, resolution) in Buckets(resolution=resolution, step=step).sizes


@pytest.mark.parametrize(
    ("resolution", "step"), [(512, 64), (768, 64), (640, 64), (128, 16), (64, 8), (96, 8), (400, 40)]
)
def test_the_default_step_is_about_an_eighth(resolution, step):
    assert default_step(resolution, 8) == step


@pytest.mark.parametrize("wrong", [{"resolution": 500}, {"resolution": 32}, {"max_ratio": 0.5}])
def test_what_makes_no_bucket_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Buckets(**{"resolution": 512, "step": 64} | wrong)


AREAS = Buckets(
    resolution=128, step=16, smaller=Buckets(resolution=96, step=16, smaller=Buckets(resolution=64, step=8))
)


@given(st.tuples(st.integers(10, 300), st.integers(10, 300)))
def test_of_several_areas_a_picture_is_in_the_largest_that_it_fills(size):
    found = {area: of.nearest(size) for area, of in AREAS.areas.items()}
    assert found == {
        area: Buckets(resolution=area, step=step).nearest(size) for area, step in ((128, 16), (96, 16), (64, 8))
    }
    filled = [area for area, (width, height) in found.items() if width <= size[0] and height <= size[1]]
    assert AREAS.nearest(size) == found[max(filled, default=64)]


def test_in_each_area_a_picture_is_once_and_otherwise_in_one():
    examples = [Example(image=Path(f"{i}.png"), size=(100 + i, 100), caption="") for i in range(3)]
    assert [AREAS.of(example) for example in examples] == [(96, 96)] * 3
    each = in_each_area(examples, AREAS)
    assert (
        len(each) == 9 and [AREAS.of(example) for example in each] == [(128, 128)] * 3 + [(96, 96)] * 3 + [(64, 64)] * 3
    )
    assert [example.image.name for example in each] == ["0.png", "1.png", "2.png"] * 3
