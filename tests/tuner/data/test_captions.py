from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tuner.data.captions import Captions, read_caption
from tuner.data.sources.folder import PictureFolder
from tuner.errors import DataError
from tuner.rng import Position

SHOWINGS = [Position(seed, epoch, sample) for seed in range(2) for epoch in range(5) for sample in range(100)]

READABLE = {
    "plain": b"a red cat",
    "byte order mark": b"\xef\xbb\xbfa red cat",
    "line ends of Windows": b"a red cat\r\n",
    "blanks of Japanese": "a red　cat".encode(),
}


@pytest.mark.parametrize("kind", READABLE)
def test_a_caption_is_one_line_of_words(kind, tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(READABLE[kind])
    assert read_caption(tmp_path / "a.txt") == "a red cat"


def test_lines_stay_apart_and_are_one_caption_unless_they_are_to_be_chosen_from(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"  a\r\n\nred\tcat \n")
    caption = read_caption(tmp_path / "a.txt")
    assert caption == "a\nred cat" and Captions().plain(caption) == "a red cat"
    assert Captions(lines="choose").variants(caption) == ["a", "red cat"]


def test_any_language_is_kept(tmp_path: Path):
    (tmp_path / "a.txt").write_text("赤い猫, größer, 🐈", encoding="utf-8")
    assert read_caption(tmp_path / "a.txt") == "赤い猫, größer, 🐈"


REFUSED = {
    "UTF-16": ("a red cat".encode("utf-16"), "not UTF-8 at byte 0; save it as UTF-8"),
    "UTF-16 without a mark": ("a red cat".encode("utf-16-le"), "holds a NUL byte"),
    "cp932": ("cat 赤い猫".encode("cp932"), "not UTF-8 at byte 4; save it as UTF-8"),
    "Latin-1": ("größer".encode("latin-1"), "not UTF-8 at byte 2"),
    "damaged behind a mark": (b"\xef\xbb\xbfab\xff", "not UTF-8 at byte 5"),
    "NUL": (b"a red\0cat", "holds a NUL byte"),
    "nothing": (b"", "is empty; write the picture's caption into it, or give all one `prompt`"),
    "blanks": (b" \r\n\t", "is empty"),
    "a mark alone": (b"\xef\xbb\xbf", "is empty"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_caption_is_refused_with_its_place(kind, tmp_path: Path):
    content, message = REFUSED[kind]
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=f"a.txt: {message}"):
        read_caption(tmp_path / "a.txt")


def folder_of(tmp_path: Path, *names: str) -> PictureFolder:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return PictureFolder(path=tmp_path)


def test_missing_captions_are_counted_and_the_first_is_named_with_what_to_do(tmp_path: Path):
    source = folder_of(tmp_path, "a.png", "b.jpg", "c.png")
    (tmp_path / "a.txt").write_text("a thing")
    with pytest.raises(
        DataError,
        match=r"2 of 3 pictures have no caption, the first is b.jpg; write b.txt, or give all one `prompt`",
    ):
        source.examples()


def test_one_caption_for_two_pictures_is_ambiguous(tmp_path: Path):
    source = folder_of(tmp_path, "a.png", "a.jpg")
    (tmp_path / "a.txt").write_text("a thing")
    with pytest.raises(DataError, match=r"a.png: shares its caption file with a.jpg; rename one of them"):
        source.examples()


def test_names_with_dots_and_equal_names_in_two_folders_are_told_apart(tmp_path: Path):
    names = ["a.b.png", "a.c.png", "x/a.png", "y/a.png", "y/.hidden.png", ".git/a.png"]
    source = folder_of(tmp_path, *names)
    for number, name in enumerate(names[:4]):
        (tmp_path / name).with_suffix(".txt").write_text(f"thing {number}")
    assert [(e.image.relative_to(tmp_path).as_posix(), e.caption) for e in source.examples()] == [
        (name, f"thing {number}") for number, name in enumerate(names[:4])
    ]


def test_names_of_any_language_with_blanks_are_read(tmp_path: Path):
    source = folder_of(tmp_path, "写真 と 絵/猫 1.PNG")
    (tmp_path / "写真 と 絵/猫 1.txt").write_text("a cat")
    (example,) = source.examples()
    assert example.caption == "a cat"


@pytest.mark.parametrize("name", ["a.heic", "A.HEIC", "b/c.psd"])
def test_pictures_of_a_kind_that_is_not_read_are_named_not_left_out(name, tmp_path: Path):
    source = folder_of(tmp_path, "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(
        DataError, match=rf"1 pictures are of a kind that is not read, the first is {Path(name).name}; save"
    ):
        source.examples()


@pytest.mark.parametrize("folder", ["nothing", "empty"])
def test_a_folder_without_pictures_is_refused(folder, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "note.md").write_text("nothing here")
    with pytest.raises(DataError, match=f"{folder}: no "):
        PictureFolder(path=tmp_path / folder, prompt="a thing").examples()


# What becomes of a caption


@st.composite
def captions(draw: st.DrawFn) -> Captions:
    shuffle, part_dropout = draw(st.booleans()), draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    return Captions(
        prefix=draw(st.sampled_from(["", "photo of ", "x, "])),
        suffix=draw(st.sampled_from(["", ", nice"])),
        trigger=draw(st.sampled_from(["", "sks", "CAT"])),
        lines=draw(st.sampled_from(["join", "choose"])),
        wildcards=draw(st.booleans()),
        shuffle=shuffle,
        keep=draw(st.integers(0, 3)) if shuffle or part_dropout else 0,
        separator=draw(st.sampled_from([",", ";", "|"])),
        part_dropout=part_dropout,
        dropout=draw(st.sampled_from([0.0, 0.3, 1.0])),
    )


TEXTS = st.sampled_from(
    [
        "",
        "cat",
        "cat, red",
        "a; b; c",
        "one, two, three",
        "a,b",
        "a | b | c,d",
        "cat\nred dog",
        "{a|b{c|d}}",
        "a {b|c} on {d|}",
    ]
)


@given(captions(), TEXTS, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_a_final_caption_depends_on_its_position_alone(captions, text, seed, epoch, sample):
    first = captions.at(text, Position(seed, epoch, sample))
    for other in SHOWINGS[:3]:
        captions.at(text, other)
    assert captions.at(text, Position(seed, epoch, sample)) == first


@given(captions(), TEXTS)
def test_the_variants_are_exactly_the_captions_that_are_shown(captions, text):
    """The cache is filled from the one, and read by the other."""
    variants = captions.variants(text)
    shown = {captions.at(text, at) for at in SHOWINGS}
    assert variants is not None and len(variants) == len(set(variants))
    assert shown <= set(variants)
    if len(variants) <= 12 and captions.part_dropout != 0.3:  # then none is so seldom that it may be missed
        assert shown == set(variants)


def test_no_empty_part_is_moved_about():
    shuffled = Captions(shuffle=True)
    assert set(shuffled.variants("a,, b, ") or ()) == {"a, b", "b, a"}
    assert {shuffled.at("a,, b, ", at) for at in SHOWINGS} == {"a, b", "b, a"}
    assert Captions(part_dropout=1.0, keep=1).variants(", a, b") == ["a"]
    assert Captions().plain("a,, b, ") == "a,, b, "


def test_too_many_variants_are_not_listed():
    tags = ", ".join("abcdefgh")
    assert Captions(shuffle=True).variants(tags) is None and Captions(part_dropout=0.1).variants(tags) is None
    assert len(Captions(shuffle=True).variants("a, b, c, d") or ()) == 24
    assert Captions(wildcards=True).variants("{a|b}{a|b}{a|b}{a|b}{a|b}{a|b}{a|b}") is None
    assert len(Captions(wildcards=True).variants("{a|b}{a|b}{a|b}{a|b}{a|b}{a|b}") or ()) == 64


@pytest.mark.parametrize("text", ["a {b", "a b}", "{a|{b}", "a {b|c}}"])
def test_a_wildcard_that_is_not_closed_is_refused(text):
    with pytest.raises(DataError, match="clos"):
        Captions(wildcards=True).plain(text)
    assert Captions().plain(text) == text


def test_each_alternative_of_a_wildcard_is_drawn_alike_often_and_apart_from_the_others():
    found = Counter(Captions(wildcards=True).at("{a|b} {c|d}", at) for at in SHOWINGS)
    assert found.keys() == {"a c", "a d", "b c", "b d"} and min(found.values()) > 180


def test_the_trigger_is_put_in_front_of_captions_that_lack_it():
    captions = Captions(trigger="sks cat", prefix="photo: ")
    assert captions.plain("on a chair") == "photo: sks cat, on a chair"
    assert captions.plain("a SKS Cat on a chair") == "photo: a SKS Cat on a chair"
    assert captions.plain("") == "photo: sks cat"


def test_a_trigger_within_another_word_calls_nothing_and_is_put_in_front_all_the_same():
    captions = Captions(trigger="sks")
    assert captions.plain("a dog with masks") == "sks, a dog with masks"
    assert captions.plain("a dog, SKS") == "a dog, SKS"
    assert Captions(trigger="<cat>").plain("a <cat>.") == "a <cat>."
    assert captions.plain("sks_dog and masks, sks") == "sks_dog and masks, sks"


@pytest.mark.parametrize(
    ("trigger", "caption"), [("sks", "sksの写真"), ("花子", "公園で花子が走る"), ("나비", "하얀 나비는")]
)
def test_a_trigger_is_found_in_scripts_that_do_not_part_words(trigger, caption):
    assert Captions(trigger=trigger).plain(caption) == caption


def test_parts_are_left_out_as_often_as_asked_for_but_for_those_that_are_kept():
    captions = Captions(part_dropout=0.3, keep=1)
    found = Counter(part for at in SHOWINGS for part in captions.at("a, b, c", at).split(", "))
    assert found["a"] == len(SHOWINGS)
    assert all(630 < found[part] < 770 for part in "bc")


def test_every_order_of_the_parts_is_shown_alike_often_behind_the_kept_ones():
    captions = Captions(shuffle=True, keep=1, prefix="photo: ")
    found = Counter(captions.at("kept ,a,  b, c", at) for at in SHOWINGS)
    assert set(found) == {"photo: " + ", ".join(("kept", *order)) for order in permutations("abc")}
    assert all(100 < count < 240 for count in found.values())  # 1000 / 6 each, and 5 standard deviations


def test_without_shuffling_a_caption_stays_as_it_is():
    assert Captions(prefix="a photo of ").at("b ,a;  c", Position(0, 0, 0)) == "a photo of b ,a;  c"


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_leaves_as_many_captions_empty_as_it_says(rate):
    captions = Captions(dropout=rate, prefix="never alone ")
    dropped = sum(captions.at("cat", at) == "" for at in SHOWINGS)
    assert dropped == pytest.approx(rate * len(SHOWINGS), abs=4.5 * (rate * (1 - rate) * len(SHOWINGS)) ** 0.5)


def test_dropout_and_order_are_drawn_apart():
    """Else those that are left would be shown in a choice of orders only."""
    plain, dropping = Captions(shuffle=True), Captions(shuffle=True, dropout=0.7)
    found = Counter(dropping.at("a,b,c", at) for at in SHOWINGS)
    for order in permutations("abc"):
        assert 15 < found[", ".join(order)] < 90  # 0.3 x 1000 / 6, and 5 standard deviations
    for at in SHOWINGS[:100]:
        assert dropping.at("a,b,c", at) in ("", plain.at("a,b,c", at))


def test_the_plain_caption_leaves_nothing_to_chance():
    assert Captions(shuffle=True, dropout=1.0, prefix="x ").plain("a, b") == "x a, b"


@pytest.mark.parametrize(
    "wrong",
    [
        {"part_dropout": 2.0},
        {"dropout": 1.5},
        {"dropout": -0.1},
        {"keep": 1},
        {"keep": -1, "shuffle": True},
        {"separator": ""},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Captions(**wrong)
