"""The resolved config: TOML that reads back to the same."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.tuner.config.drawing import Config, Ink
from tests.tuner.config.shapes.circle import Circle
from tests.tuner.config.shapes.group import Group
from tests.tuner.config.shapes.square import Square
from tuner.config.loader import load
from tuner.config.writer import to_toml

# TOML is Unicode text: every character but half of a surrogate pair
text = st.text(st.characters(exclude_categories=["Cs"]))
finite = st.floats(allow_nan=False, allow_infinity=False)
whole = st.integers(-(2**63), 2**63 - 1)
inks = st.builds(Ink, colour=text, width=finite)
simple = st.builds(Circle, radius=st.floats(min_value=1e-300, allow_infinity=False)) | st.builds(Square, side=whole)
shapes = st.recursive(
    simple,
    lambda inner: st.builds(Group, parts=st.lists(inner, max_size=2).map(tuple), first=st.none() | inner),
    max_leaves=4,
)
configs = st.builds(
    Config,
    output=text.map(Path),
    shape=shapes,
    learning_rate=finite,
    copies=whole,
    name=text,
    verbose=st.booleans(),
    seed=st.none() | whole,
    precision=st.sampled_from(["fp32", "bf16"]),
    scale=st.just("auto") | finite,
    size=st.tuples(whole, whole),
    words=st.lists(text, max_size=3).map(tuple),
    ranks=st.dictionaries(text, whole, max_size=3),
    ink=inks,
    second_ink=st.none() | inks,
    inks=st.lists(inks, max_size=2).map(tuple),
    frame=shapes,
    shapes=st.lists(shapes, max_size=2).map(tuple),
    margin=finite,
)


@given(configs)
def test_a_written_config_reads_back_to_the_same(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("config") / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load(Config, file) == config


def test_the_type_comes_first_and_defaults_are_written_out():
    written = to_toml(Config(output=Path("out"), shape=Circle()))
    assert '[shape]\ntype = "circle"\nradius = 1.0\n' in written
    assert "learning_rate = 0.0001\n" in written
    assert "seed" not in written
