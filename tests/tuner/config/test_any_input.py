"""Whatever is in a file or on the command line: a config, or a `ConfigError` of printable lines. Never a bug."""

import string

import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from tests.tuner.config.drawing import Config
from tuner.config.loader import load
from tuner.errors import ConfigError

NAMES = [*Config.__dataclass_fields__, "type", "radius", "side", "parts", "first", "colour", "width", "0", "x y", ""]
CLASSES = ["circle", "square", "group", "base", "os.path", "tests.tuner.config.drawing:Ink", "a.b:c", "..", ":"]
scalars = (
    st.sampled_from(CLASSES)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    | st.integers(-(2**64), 2**64)
    | st.floats()
    | st.booleans()
    | st.dates()
    | st.times()
    | st.datetimes()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
trees = st.dictionaries(st.sampled_from(NAMES), values, max_size=5)
paths = st.lists(st.sampled_from([*NAMES, "1", "'x y'", "é"]), min_size=1, max_size=3).map(".".join)
overrides = st.builds("{}={}".format, paths, st.text(max_size=8) | st.sampled_from(CLASSES)) | st.text(max_size=8)


def accepts(*arguments) -> bool:
    try:
        load(Config, *arguments)
    except ConfigError as error:
        assert str(error).strip()
        return False
    return True


@given(trees, st.lists(overrides, max_size=2))
def test_any_tree_is_read_or_refused(tmp_path_factory, tree, given_overrides):
    file = tmp_path_factory.mktemp("any") / "any.toml"
    file.write_bytes(tomli_w.dumps(tree).encode())
    accepts(file, given_overrides)


@given(st.lists(overrides, max_size=3))
def test_any_arguments_are_read_or_refused(given_overrides):
    accepts(None, ["output=x", "shape.type=circle", "shapes=[{type='circle'}, {type='group'}]", *given_overrides])


@given(st.binary(max_size=60) | st.text(string.printable, max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("any") / "any.toml"
    file.write_bytes(content)
    assert not accepts(file)


def test_depth_without_end_is_refused(tmp_path):
    file = tmp_path / "deep.toml"
    file.write_text("a = " + "[" * 100_000)
    assert not accepts(file)
    file.write_text("a = " + "{a=" * 300 + "1" + "}" * 300)
    assert not accepts(file)
    assert not accepts(None, ["a=" + "[" * 100_000])
