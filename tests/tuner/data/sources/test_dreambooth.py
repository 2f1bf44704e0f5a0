import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from tuner.data.sources.base import Wanted
from tuner.data.sources.dreambooth import Dreambooth, record
from tuner.errors import DataError, ResourceError


def draw(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (64, 64)).save(folder / name)
    return folder


def source(folder: Path, subjects: int = 3, **changes: object) -> Dreambooth:
    subject = draw(folder / "subject", *(f"{i}.png" for i in range(subjects)))
    fields = {"class_folder": folder / "class", "class_prompt": "a robot", "class_count": 5, **changes}
    return Dreambooth(subject=subject, prompt="a sks robot", **fields)  # pyright: ignore[reportArgumentType]


def make(wanted: Sequence[Wanted], base: str = "pocket", contents: str = "1f") -> None:
    record(wanted, base, contents)
    for w in wanted:
        Image.new("RGB", (64, 64)).save(w.image)


def test_class_pictures_are_wanted_where_there_are_too_few_each_from_its_own_seed(tmp_path: Path):
    wanted = source(tmp_path).wanted("pocket", "1f")
    assert [(w.image.name, w.prompt, w.seed) for w in wanted] == [
        (f"class-{seed:05d}.png", "a robot", seed) for seed in range(5)
    ]
    make(wanted)
    assert source(tmp_path).wanted("pocket", "1f") == []


def test_an_interrupted_making_goes_on_with_what_is_missing(tmp_path: Path):
    wanted = source(tmp_path).wanted("pocket", "1f")
    make(wanted)
    for index in (1, 3):
        wanted[index].image.unlink()
    assert source(tmp_path).wanted("pocket", "1f") == [wanted[1], wanted[3]]


def test_own_class_pictures_count_and_only_the_made_ones_are_listed(tmp_path: Path):
    draw(tmp_path / "class", "photo 1.jpg", "photo 2.jpg")
    wanted = source(tmp_path).wanted("pocket", "1f")
    assert len(wanted) == 3
    make(wanted)
    content = json.loads((tmp_path / "class" / "generated.json").read_text())
    assert content == {
        "base": "pocket",
        "contents": "1f",
        "prompt": "a robot",
        "pictures": [w.image.name for w in wanted],
    }
    more = source(tmp_path, class_count=6).wanted("pocket", "1f")
    make(more)
    content = json.loads((tmp_path / "class" / "generated.json").read_text())
    assert content["pictures"] == sorted(w.image.name for w in [*wanted, *more])


def test_enough_own_class_pictures_need_no_base_and_no_record(tmp_path: Path):
    draw(tmp_path / "class", *(f"{i}.png" for i in range(8)))
    assert source(tmp_path).wanted("anything", None) == []
    assert [e.source for e in source(tmp_path).examples()].count("class") == 8
    assert not (tmp_path / "class" / "generated.json").exists()


@pytest.mark.parametrize(
    ("changes", "base", "contents", "said"),
    [
        ({"class_prompt": "a toy"}, "pocket", "1f", "from the prompt 'a robot', not 'a toy'"),
        ({}, "another", "2e", "by the base 'pocket', not by 'another'"),
        ({}, "another", None, "by the base 'pocket', not by 'another'"),  # it is not here, so its name has to do
        ({}, "pocket", "2e", "by the base 'pocket', not by 'pocket' as it is now"),
    ],
)
def test_pictures_of_another_prompt_or_base_are_refused(changes, base, contents, said, tmp_path: Path):
    make(source(tmp_path).wanted("pocket", "1f"))
    with pytest.raises(DataError, match=rf"class: was made {said}; give another class_folder or remove it"):
        source(tmp_path, **changes).wanted(base, contents)


def test_a_base_under_another_name_is_the_same_base(tmp_path: Path):
    make(source(tmp_path).wanted("bases/mine", "1f"), "bases/mine")
    assert source(tmp_path).wanted("moved/mine", "1f") == [] == source(tmp_path).wanted("bases/mine", None)


@pytest.mark.parametrize("content", ["", "{", "[]", "\0"])
def test_a_damaged_record_is_named(content, tmp_path: Path):
    make(source(tmp_path).wanted("pocket", "1f"))
    (tmp_path / "class" / "generated.json").write_text(content)
    with pytest.raises(DataError, match=r"generated.json: .*; remove it with the pictures beside it"):
        source(tmp_path).wanted("pocket", "1f")


def test_a_class_folder_that_cannot_be_made_is_named(tmp_path: Path):
    wanted = source(tmp_path).wanted("pocket", "1f")
    (tmp_path / "class").write_text("a file")
    with pytest.raises(ResourceError, match=r"class: cannot be written"):
        record(wanted, "pocket", "1f")


def shown(dreambooth: Dreambooth) -> dict[str, int]:
    """How many times an epoch shows each side."""
    sides = {"subject": 0, "class": 0}
    for example in dreambooth.examples():
        sides[example.source] += example.repeats
    return sides


@pytest.mark.parametrize(("subjects", "classes"), [(1, 12), (3, 12), (5, 12), (4, 4), (12, 3), (12, 1), (7, 10)])
def test_both_sides_are_shown_about_alike_often(subjects, classes, tmp_path: Path):
    draw(tmp_path / "class", *(f"{i}.png" for i in range(classes)))
    sides = shown(source(tmp_path, subjects=subjects, class_count=1))
    assert 2 / 3 <= sides["subject"] / sides["class"] <= 3 / 2
    assert max(sides.values()) <= 1.5 * max(subjects, classes)


def test_each_side_has_its_prompt_and_weight(tmp_path: Path):
    draw(tmp_path / "class", *(f"{i}.png" for i in range(5)))
    rows = {(e.source, e.caption, e.weight) for e in source(tmp_path, prior_weight=0.3).examples()}
    assert rows == {("subject", "a sks robot", 1.0), ("class", "a robot", 0.3)}


def test_without_a_class_the_subject_is_repeated_as_asked(tmp_path: Path):
    subject = draw(tmp_path / "subject", "0.png", "1.png")
    plain = Dreambooth(subject=subject, prompt="a sks robot", repeats=7)
    assert plain.wanted("pocket", "1f") == () and shown(plain) == {"subject": 14, "class": 0}


@pytest.mark.parametrize("there", [0, 2, 5])
def test_pictures_that_are_still_wanted_can_be_counted_before_they_are_made(there, tmp_path: Path):
    if there:
        make(source(tmp_path).wanted("pocket", "1f")[:there])
    planned = source(tmp_path).examples(unmade=(64, 64))
    make(source(tmp_path).wanted("pocket", "1f"))
    made = source(tmp_path).examples()
    assert sorted(planned, key=lambda e: e.image) == sorted(made, key=lambda e: e.image)


@pytest.mark.parametrize("place", ["subject", "subject/class"])
def test_class_pictures_among_the_subjects_are_refused(place, tmp_path: Path):
    with pytest.raises(DataError, match=r"class_folder lies inside the subject's folder; move it beside"):
        source(tmp_path, class_folder=tmp_path / place).wanted("pocket", "1f")


@pytest.mark.parametrize(
    "wrong",
    [
        {"class_prompt": None},
        {"class_folder": None},
        {"class_count": 0},
        {"prior_weight": 0.0},
        {"repeats": 0},
        {"repeats": 2},  # decided by the class pictures
        {"class_folder": None, "class_prompt": None},  # class_count would have no effect
        {"class_folder": None, "class_prompt": None, "class_count": 100, "prior_weight": 0.5},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, tmp_path: Path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        source(tmp_path, **wrong)


# Prior prediction


def test_prior_prediction_shows_the_subject_under_the_class_prompt_and_wants_no_pictures(tmp_path: Path):
    made = source(tmp_path, class_folder=None, class_count=100, prior_prediction=True, prior_weight=0.5, repeats=2)
    assert made.wanted("pocket", "1f") == ()
    found = made.examples()
    subject, prior = found[:3], found[3:]
    assert [(e.image, e.size, e.repeats) for e in subject] == [(e.image, e.size, e.repeats) for e in prior]
    assert {(e.caption, e.weight, e.prior, e.source) for e in subject} == {("a sks robot", 1.0, False, "subject")}
    assert {(e.caption, e.weight, e.prior, e.source) for e in prior} == {("a robot", 0.5, True, "class")}


def test_prior_prediction_takes_the_class_folders_pictures_as_they_are_and_adds_none(tmp_path: Path):
    draw(tmp_path / "class", "a.png", "b.png")
    made = source(tmp_path, class_count=100, prior_prediction=True)
    assert made.wanted("pocket", "1f") == ()
    found = made.examples(unmade=(64, 64))
    assert [(e.image.name, e.caption, e.prior) for e in found if e.source == "class"] == [
        ("a.png", "a robot", True),
        ("b.png", "a robot", True),
    ]
    assert not any(e.prior for e in found if e.source == "subject")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"class_prompt": None}, "needs class_prompt"), ({"class_count": 5}, "class_count has no effect")],
)
def test_prior_prediction_refuses_what_it_cannot_use(tmp_path: Path, changes, message):
    with pytest.raises(ValueError, match=message):
        source(tmp_path, **{"class_folder": None, "class_count": 100, "prior_prediction": True, **changes})
