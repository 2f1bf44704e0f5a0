"""TOML to frozen dataclasses: what is read, and how mistakes are told."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tuner.config.drawing import Config, Ink
from tests.tuner.config.shapes.circle import Circle
from tests.tuner.config.shapes.group import Group
from tests.tuner.config.shapes.square import Square
from tuner.config.loader import load
from tuner.errors import ConfigError

GOOD = 'output = "out"\nshape = { type = "circle" }\n'


def read(folder: Path, text: str | bytes, *overrides: str) -> Config:
    file = folder / "my.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(Config, file, overrides)


def complaint(folder: Path, text: str | bytes, *overrides: str) -> str:
    """The message that refuses `text`, without the folder's name."""
    with pytest.raises(ConfigError) as error:
        read(folder, text, *overrides)
    return str(error.value).replace(f"{folder}/", "")


def test_every_kind_of_field_is_read(tmp_path):
    text = """
        output = "out/日本"
        learning_rate = 1
        copies = 3
        name = "a # b"
        verbose = true
        seed = 0
        precision = "fp32"
        scale = 2
        size = [1, 2]
        words = ["x", "y"]
        margin = 1e1

        [ranks]
        "to_q.*" = 4
        [shape]
        type = "group"
        [[shape.parts]]
        type = "square"
        side = 2
        [[shape.parts]]
        type = "tests.tuner.config.shapes.circle:Circle"
        radius = 2
        [second_ink]
        [[inks]]
        colour = "red"
        [frame]
        type = "square"
        side = 9
        [[shapes]]
        type = "circle"
    """
    assert read(tmp_path, text) == Config(
        output=Path("out/日本"),
        learning_rate=1.0,
        copies=3,
        name="a # b",
        verbose=True,
        seed=0,
        precision="fp32",
        scale=2.0,
        size=(1, 2),
        words=("x", "y"),
        margin=10.0,
        ranks={"to_q.*": 4},
        shape=Group(parts=(Square(side=2), Circle(radius=2.0))),
        second_ink=Ink(),
        inks=(Ink(colour="red"),),
        frame=Square(side=9),
        shapes=(Circle(),),
    )
    assert type(read(tmp_path, text).learning_rate) is float


def test_defaults_are_the_classes_own(tmp_path):
    assert read(tmp_path, GOOD) == Config(output=Path("out"), shape=Circle())


# The value of `learning_rate` as it is written, and what it has to become: a number or a complaint.
VALUES = [
    ("1e-4", 1e-4),
    ("1E-4", 1e-4),
    ("1", 1.0),
    ("0.5", 0.5),
    ("-1", -1.0),
    ("1_000", 1000.0),
    ("\t1e-4\t", 1e-4),
    ("nan", "expected a finite number, got nan"),
    ("-inf", "expected a finite number, got -inf"),
    ('"5"', "expected a number, got '5'; remove the quotes"),
    ('"1e-4"', "expected a number, got '1e-4'; remove the quotes"),
    ('"fast"', "expected a number, got 'fast'"),
    ("true", "expected a number, got true"),
    ("[1.0]", "expected a number, got a list"),
    ("{ a = 1 }", "expected a number, got a table"),
    ("12:30:00", "expected no date or time, got 12:30:00; put it in quotes if it is text"),
]
WORDS = "this is no TOML value; text needs quotes, and there is no null: leave the key out"
NO_TOML = {
    ".nan": WORDS,
    "on": WORDS,
    "null": WORDS,
    "": WORDS,
    "010": "not valid TOML: expected newline or end of document after a statement",
    "12:30": "not valid TOML: expected newline or end of document after a statement",
}


@pytest.mark.parametrize("text, expected", VALUES, ids=[text for text, _ in VALUES])
def test_a_value_has_the_right_type_or_is_refused(tmp_path, text, expected):
    config = f"{GOOD}learning_rate = {text}\n"
    if isinstance(expected, float):
        assert read(tmp_path, config).learning_rate == expected
    else:
        assert complaint(tmp_path, config) == f"my.toml:3: learning_rate: {expected}"


@pytest.mark.parametrize("text", NO_TOML, ids=repr)
def test_what_is_no_toml_is_refused_with_its_line(tmp_path, text):
    line = f"learning_rate = {text}".strip()
    assert complaint(tmp_path, f"{GOOD}learning_rate = {text}\ncopies = 2\n") == f"my.toml:3: {line}: {NO_TOML[text]}"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "learning_rate: 1e-4",
            "my.toml:3: learning_rate: 1e-4: not valid TOML: expected '=' after a key in a key/value pair",
        ),
        ("copies = 1\ncopies = 2", "my.toml:4: copies = 2: this key is given twice"),
        ("learning_rat = 1", "my.toml:3: learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("copies = 1.0", "my.toml:3: copies: expected a whole number, got 1.0"),
        ("copies = true", "my.toml:3: copies: expected a whole number, got true"),
        ("verbose = 1", "my.toml:3: verbose: expected true or false, got 1"),
        ("verbose = 'yes'", "my.toml:3: verbose: expected true or false, got 'yes'"),
        ("name = 5", "my.toml:3: name: expected text, got 5; put it in quotes"),
        ("seed = 'x'", "my.toml:3: seed: expected a whole number, got 'x'"),
        ("precision = 'fp8'", "my.toml:3: precision: expected one of 'fp32' or 'bf16', got 'fp8'"),
        ("scale = 'car'", "my.toml:3: scale: expected a number or 'auto', got 'car'"),
        ("words = 'x'", "my.toml:3: words: expected a list, got 'x'"),
        ("words = [\n 'x',\n 1\n]", "my.toml:3: words.1: expected text, got 1; put it in quotes"),
        ("size = [1]", "my.toml:3: size.1: missing"),
        ("frame = 'circle'", "my.toml:3: frame: expected a table with a 'type'"),
        ("[frame]", "my.toml:3: frame.type: missing; one of circle, group, square"),
        ("[frame]\ntype = 3", "my.toml:4: frame.type: expected one of circle, group, square"),
        (
            "[frame]\ntype = 'sqare'",
            "my.toml:4: frame.type: no 'sqare' here; did you mean 'square'? (there are: circle, group, square)",
        ),
        ("[frame]\ntype = 'square'", "my.toml:3: frame.side: missing"),
        ("[frame]\n\ntype = 'square'\nsid = 4\nside = 3", "my.toml:6: frame.sid: unknown key; did you mean 'side'?"),
        ("[frame]\ntype = 'circle'\nradius = -1", "my.toml:3: frame: radius must be positive, got -1.0"),
        ("[[inks]]\nwidth = 1\n[[inks]]\nwidht = 1", "my.toml:6: inks.1.widht: unknown key; did you mean 'width'?"),
        (
            "[frame]\ntype = 'group'\n[[frame.parts]]\ntype = 'circle'\n[[frame.parts]]\ntype = 'circle'\nr = 1",
            "my.toml:9: frame.parts.1.r: unknown key; the keys here are radius",
        ),
        ("[ranks]\n'to q' = 'x'", "my.toml:4: ranks.'to q': expected a whole number, got 'x'"),
        ("second_ink.colour = 3", "my.toml:3: second_ink.colour: expected text, got 3; put it in quotes"),
        ('name = """\nlong\n"""\ncopies = "x"', "my.toml:6: copies: expected a whole number, got 'x'"),
    ],
)
def test_a_mistake_is_told_with_its_line_its_path_and_what_was_expected(tmp_path, text, message):
    assert complaint(tmp_path, f"{GOOD}{text}\n") == message


@dataclass(frozen=True)
class Dot:
    """What may be a number or a table."""

    size: float | Ink = 1.0
    sizes: tuple[float | Ink, ...] = ()


@pytest.mark.parametrize(
    "override, message",
    [
        ("size=x", "size: expected a number or a table, got 'x'"),
        ("size.color=red", "size.color: unknown key; did you mean 'colour'?"),
        ("sizes=[1, {width=true}]", "sizes.1.width: expected a number, got true"),
    ],
)
def test_a_table_where_a_number_may_stand_is_told_what_is_wrong_in_it(override, message):
    assert load(Dot, None, ["size=2", "sizes=[3, {width=4}]"]) == Dot(2.0, (3.0, Ink(width=4.0)))
    with pytest.raises(ConfigError) as error:
        load(Dot, None, [override])
    assert str(error.value) == f"command line: {message}"


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path):
    text = 'copies = "x"\nfoo = 1\n[ink]\nwidth = "thin"\ncolor = 3\n[frame]\ntype = "circle"\nradius = "r"\n'
    assert complaint(tmp_path, text, "verbose=maybe").split("\n") == [
        "my.toml: output: missing",
        "my.toml: shape: missing",
        "my.toml:1: copies: expected a whole number, got 'x'",
        "my.toml:2: foo: unknown key; the keys here are " + ", ".join(Config.__dataclass_fields__),
        "my.toml:4: ink.width: expected a number, got 'thin'",
        "my.toml:5: ink.color: unknown key; did you mean 'colour'?",
        "my.toml:8: frame.radius: expected a number, got 'r'",
        "command line: verbose: expected true or false, got 'maybe'",
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()) == read(tmp_path, GOOD)


def test_another_encoding_is_refused(tmp_path):
    assert complaint(tmp_path, GOOD.encode("utf-16")) == "my.toml: not UTF-8 text (at byte 0); save it as UTF-8"


def test_a_missing_file_is_told_with_a_similar_one(tmp_path):
    (tmp_path / "lora.toml").write_text("")
    with pytest.raises(ConfigError, match=r"lorra.toml: no such file; did you mean 'lora.toml'\?"):
        load(Config, tmp_path / "lorra.toml")
    with pytest.raises(ConfigError, match="no such file"):
        load(Config, tmp_path / "nowhere" / "lora.toml")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="not a file; give the path of a"):
        load(Config, tmp_path)


@pytest.mark.parametrize(
    "override, field, value",
    [
        ("copies=2", "copies", 2),
        ("learning_rate=3", "learning_rate", 3.0),
        ("learning_rate = 1e-5", "learning_rate", 1e-5),
        ("precision=fp32", "precision", "fp32"),
        ("verbose=true", "verbose", True),
        ("name=", "name", ""),
        ("name=two words", "name", "two words"),
        ("name=a=b", "name", "a=b"),
        ("name=2026", "name", "2026"),
        ("name=1.50", "name", "1.50"),
        ("name=2026-01-01", "name", "2026-01-01"),
        ("name=日本語", "name", "日本語"),
        ("name='quoted'", "name", "quoted"),
        ("name=1\ncopies = 9", "name", "1\ncopies = 9"),
        ("name=[not a list", "name", "[not a list"),
        ("output=C:\\new\\table", "output", Path("C:\\new\\table")),
        ('words=["a", "b"]', "words", ("a", "b")),
        ("ranks.'to_q.*'=2", "ranks", {"to_q.*": 2}),
        ("ink.width=9", "ink", Ink(width=9.0)),
        ("second_ink.colour=red", "second_ink", Ink(colour="red")),
        ("shapes.1.side=7", "shapes", (Circle(), Square(side=7))),
        ("shapes=[]", "shapes", ()),
        ("frame.type=circle", "frame", Circle()),
    ],
)
def test_an_override_sets_its_value(tmp_path, override, field, value):
    text = GOOD + '[[shapes]]\ntype = "circle"\n[[shapes]]\ntype = "square"\nside = 1\n'
    assert getattr(read(tmp_path, text, override), field) == value


def test_overrides_apply_in_their_order(tmp_path):
    assert read(tmp_path, GOOD, "copies=2", "copies=3").copies == 3


def test_overrides_need_no_file():
    assert load(Config, None, ["output=x", "shape.type=circle"]) == Config(output=Path("x"), shape=Circle())


@pytest.mark.parametrize(
    "override, message",
    [
        ("copis=2", "copis: unknown key; did you mean 'copies'?"),
        ("copies", "'copies': an override reads path=value, such as optimizer.lr=1e-4"),
        ("name=\udc80", "'name=\\udc80': not UTF-8 text"),
        ("#=2", "'#=2': an override reads path=value, such as optimizer.lr=1e-4"),
        ("=2", "'=2': an override reads path=value, such as optimizer.lr=1e-4"),
        ("two words=2", "'two words=2': an override reads path=value, such as optimizer.lr=1e-4"),
        ("copies=010", "copies: expected a whole number, got '010'"),
        ("copies='3'", "copies: expected a whole number, got '3'; remove the quotes"),
        ("copies=null", "copies: expected a whole number, got 'null'"),
        ("output.x=2", "output.x: output is a value, not a table"),
        ("shapes.1.side=2", "shapes.1: shapes is a list of 1; number its entries from 0"),
        ("shapes.x=2", "shapes.x: shapes is a list of 1; number its entries from 0"),
        ("shape.radius=0", None),
    ],
)
def test_a_wrong_override_is_refused(tmp_path, override, message):
    text = GOOD + '[[shapes]]\ntype = "circle"\n'
    expected = "my.toml:2: shape: radius must be positive, got 0.0" if message is None else f"command line: {message}"
    assert complaint(tmp_path, text, override) == expected
