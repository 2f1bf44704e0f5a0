"""A folder is a registry."""

import subprocess
import sys
from typing import Annotated

import pytest
from pydantic import TypeAdapter

from tests.tuner.config.shapes.base import AnyShape, Shape
from tests.tuner.config.shapes.circle import Circle
from tests.tuner.config.shapes.group import Group
from tests.tuner.config.shapes.square import Square
from tuner.errors import ConfigError
from tuner.plugins import Folder, read, write

SHAPES = Folder("tests.tuner.config.shapes")


def test_the_members_are_the_modules_without_base_and_private_ones():
    assert SHAPES.names() == ["circle", "group", "square"]


def test_listing_the_members_imports_none_of_them():
    code = (
        "import sys; from tuner.plugins import Folder; Folder('tests.tuner.config.shapes').names();"
        "print(*[name for name in sys.modules if name.startswith('tests.tuner.config.shapes.') or name == 'torch'])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""


@pytest.mark.parametrize(
    "name, kind",
    [
        ("circle", Circle),
        ("tests.tuner.config.shapes.square", Square),
        ("tests.tuner.config.shapes.square:Square", Square),
        ("tests.tuner.config.drawing:Ink", None),
    ],
)
def test_a_name_finds_its_class(name, kind):
    from tests.tuner.config.drawing import Ink

    assert SHAPES.find(name) is (kind or Ink)


@pytest.mark.parametrize("kind", [Circle, Square, Group])
def test_a_class_has_the_name_that_finds_it(kind):
    assert SHAPES.find(SHAPES.name_of(kind)) is kind


def test_a_class_of_another_folder_has_a_dotted_name_that_finds_it():
    from tests.tuner.config.drawing import Ink

    assert SHAPES.name_of(Ink) == "tests.tuner.config.drawing:Ink"
    assert SHAPES.find(SHAPES.name_of(Ink)) is Ink


@pytest.mark.parametrize(
    "name, message",
    [
        ("sqare", "shape.type: no 'sqare' here; did you mean 'square'? (there are: circle, group, square)"),
        ("xyz", "shape.type: no 'xyz' here (there are: circle, group, square)"),
        ("base", "shape.type: no 'base' here (there are: circle, group, square)"),
        ("", "shape.type: no '' here (there are: circle, group, square)"),
        ("nowhere.at_all", "shape.type: no module 'nowhere.at_all' can be imported"),
        ("tests.nowhere", "shape.type: no module 'tests.nowhere' can be imported"),
        ("json:JSONDecoder", "shape.type: json has no dataclass 'JSONDecoder'"),
        ("json.decoder", "shape.type: json.decoder has no dataclass 'SPEC'"),
        ("..circle", "shape.type: '..circle' is no 'package.module' or 'package.module:Class'"),
        (":Circle", "shape.type: ':Circle' is no 'package.module' or 'package.module:Class'"),
    ],
)
def test_a_wrong_name_is_refused_with_the_right_ones(name, message):
    with pytest.raises(ConfigError) as error:
        SHAPES.find(name, "shape.type")
    assert str(error.value) == message


def test_a_table_becomes_an_instance_and_an_instance_a_table():
    adapter = TypeAdapter(Annotated[Shape, SHAPES])
    circle = adapter.validate_python({"type": "circle", "radius": 2})
    assert circle == Circle(radius=2.0)
    assert adapter.dump_python(circle) == {"type": "circle", "radius": 2.0}


def test_a_ready_instance_is_taken_as_it_is():
    square = Square(side=3)
    assert TypeAdapter(AnyShape).validate_python(square) is square


def test_a_member_that_has_members_is_read_and_written():
    group = Group(parts=(Circle(radius=2.0), Group(parts=(Square(side=1),), first=Circle())))
    assert read(Group, write(group)) == group
    assert write(group)["parts"][1] == {
        "type": "group",
        "parts": [{"type": "square", "side": 1}],
        "first": {"type": "circle", "radius": 1.0},
    }
