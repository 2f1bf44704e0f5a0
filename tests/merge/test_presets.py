"""Presets against the numbers that other programs ship."""

import pytest

from merge.presets import ALIASES, LABELS, PRESETS, REVERSED, curve, folded

# Published values, rounded to six digits: of IN00, IN01, IN05, IN11, M00, OUT03, OUT10, OUT11.
PUBLISHED = {
    "GRAD_V": (1, 0.916667, 0.583333, 0.083333, 0, 0.333333, 0.916667, 1),
    "GRAD_A": (0, 0.083333, 0.416667, 0.916667, 1, 0.666667, 0.083333, 0),
    "FLAT_25": (0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25),
    "FLAT_75": (0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75),
    "WRAP08": (1, 1, 0, 0, 0, 0, 1, 1),
    "WRAP12": (1, 1, 1, 0, 0, 0, 1, 1),
    "MID12_50": (0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0),
    "OUT07": (0, 0, 0, 0, 0, 0, 1, 1),
    "OUT12": (0, 0, 0, 0, 0, 1, 1, 1),
    "OUT12_5": (0, 0, 0, 0, 0.5, 1, 1, 1),
    "RING08_SOFT": (0, 0, 0.5, 0, 0, 1, 0, 0),
    "RING08_5": (0, 0, 0, 0, 0, 1, 0, 0),
    "RING10_5": (0, 0, 1, 0, 0, 1, 0, 0),
    "RING10_3": (0, 0, 0, 0, 0, 1, 0, 0),
    "SMOOTHSTEP": (0, 0.005064, 0.112124, 0.437645, 0.5, 0.740741, 0.994936, 1),
    "REVERSE-SMOOTHSTEP": (1, 0.994936, 0.887876, 0.562355, 0.5, 0.259259, 0.005064, 0),
    "SMOOTHSTEP*2": (0, 0.010127, 0.224248, 0.875289, 1, 0.518519, 0.010127, 0),
    "SMOOTHSTEP*3": (0, 0.015191, 0.336372, 0.687066, 0.5, 0.222222, 0.984809, 1),
    "SMOOTHSTEP*4": (0, 0.020255, 0.448495, 0.249421, 0, 0.962963, 0.020255, 0),
    "R_SMOOTHSTEP*4": (1, 0.979745, 0.551505, 0.750579, 1, 0.037037, 0.979745, 1),
    "SMOOTHSTEP/2": (0, 0.019676, 0.376157, 0.980324, 1, 0.740741, 0.019676, 0),
    "SMOOTHSTEP/3": (0, 0.042969, 0.683594, 0.683594, 0.5, 0, 0.957031, 1),
    "SMOOTHSTEP/4": (0, 0.074074, 0.925926, 0.074074, 0, 0.740741, 0.074074, 0),
    "COSINE": (1, 0.995722, 0.896677, 0.565263, 0.5, 0.25, 0.004278, 0),
    "REVERSE_COSINE": (0, 0.004278, 0.103323, 0.434737, 0.5, 0.75, 0.995722, 1),
    "TRUE_CUBIC_HERMITE": (0, 0.199032, 0.549992, 0.547279, 0.520833, 0.442901, 0.842635, 1),
    "FAKE_CUBIC_HERMITE": (0, 0.157576, 0.512997, 0.523847, 0.5, 0.432099, 0.842424, 1),
    "FAKE_REVERSE_CUBIC_HERMITE": (1, 0.842424, 0.487003, 0.476153, 0.5, 0.567901, 0.157576, 0),
    "ALL_A": (0, 0, 0, 0, 0, 0, 0, 0),
    "ALL_B": (1, 1, 1, 1, 1, 1, 1, 1),
}
PLACES = ("IN00", "IN01", "IN05", "IN11", "M00", "OUT03", "OUT10", "OUT11")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_numbers(name):
    assert [curve(name)[place] for place in PLACES] == pytest.approx(PUBLISHED[name], abs=1e-6)


# How many blocks after BASE have each number, where a preset has but a few.
COUNTS = {
    "WRAP08": {1: 8, 0: 17},
    "WRAP12": {1: 12, 0: 13},
    "WRAP14": {1: 14, 0: 11},
    "WRAP16": {1: 16, 0: 9},
    "MID12_50": {0.5: 14, 0: 11},  # as published, whatever its name says
    "OUT07": {1: 7, 0: 18},
    "OUT12_5": {1: 12, 0.5: 1, 0: 12},
    "RING08_SOFT": {1: 6, 0.5: 4, 0: 15},
    "RING08_5": {1: 8, 0: 17},
    "RING10_5": {1: 10, 0: 15},
    "RING10_3": {1: 10, 0: 15},
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_of_runs_has_as_many_blocks_of_each_number(name):
    numbers = PRESETS[name][1:]
    assert {number: numbers.count(number) for number in numbers} == COUNTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_26_numbers_from_0_to_1_and_keeps_the_base(name):
    assert len(PRESETS[name]) == len(LABELS) == 26
    assert all(-1e-15 <= number <= 1 for number in PRESETS[name])
    assert PRESETS[name][0] == (1 if name == "ALL_B" else 0)


def test_a_reversed_preset_and_its_original_add_up_to_one():
    for name, original in REVERSED.items():
        sums = [a + b for a, b in zip(PRESETS[name], PRESETS[original], strict=True)]
        assert sums == pytest.approx([0, *[1] * 25])


def test_an_alias_is_a_preset_by_another_name():
    assert not ALIASES.keys() & PRESETS.keys()
    assert curve("HALF_R_SMOOTHSTEP") == curve("R_SMOOTHSTEP/2")
    assert curve("2SMOOTHSTEP") == curve("SMOOTHSTEP*2")
    assert {tuple(curve(alias).values()) for alias in ALIASES} <= set(PRESETS.values())


def test_an_unknown_preset_is_told_a_similar_one():
    with pytest.raises(ValueError, match=r"no preset 'grad_v'; did you mean 'GRAD_V'\?$"):
        curve("grad_v")
    with pytest.raises(ValueError, match=r"no preset 'x' \(there are: GRAD_V, GRAD_A, "):
        curve("x")


def test_folding_goes_up_and_down_between_0_and_1():
    assert [folded(y) for y in (0, 0.25, 1, 1.25, 2, 2.25, 3, 4)] == [0, 0.25, 1, 0.75, 0, 0.25, 1, 0]
