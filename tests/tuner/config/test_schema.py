"""What a config class says about itself."""

import re
from dataclasses import dataclass
from typing import Any

import pytest

from tests.tuner.config.drawing import Config, Ink
from tests.tuner.config.shapes.circle import Circle
from tests.tuner.config.shapes.square import Square
from tuner.config.loader import load
from tuner.config.schema import annotated_toml, class_doc, field_docs, json_schema
from tuner.errors import ConfigError

MEMBERS = ["circle", "group", "square"]
SHAPES = "tests.tuner.config.shapes"


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if "$ref" in node else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_a_field_is_described_by_the_string_below_it_also_an_inherited_one():
    assert field_docs(Config)["seed"] == "Where chance starts."
    assert field_docs(Config)["margin"] == "In millimetres."
    assert field_docs(Ink)["colour"] == "A colour's name.\n\nIn English."
    assert set(field_docs(Config)) == set(Config.__dataclass_fields__)


def test_a_class_is_described_by_its_docstring_not_by_its_signature():
    assert class_doc(Circle) == "All points at one distance."
    assert class_doc(Square) == ""


def test_the_json_schema_has_every_field_with_its_description_and_no_other_key():
    schema = json_schema(Config)
    assert list(schema["properties"]) == list(Config.__dataclass_fields__)
    assert {name: value["description"] for name, value in schema["properties"].items()} == field_docs(Config)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["output", "shape"]
    assert schema["description"] == "A drawing."
    seed = schema["properties"]["seed"]
    assert seed == {"title": "Seed", "type": "integer", "description": "Where chance starts."}
    assert schema["properties"]["learning_rate"]["default"] == 1e-4
    assert schema["$defs"]["Ink"]["additionalProperties"] is False


def test_the_json_schema_lists_the_members_of_a_folder_each_with_its_type():
    schema = json_schema(Config)
    *members, outside = schema["$defs"][SHAPES]["oneOf"]
    assert [member["$ref"] for member in members] == [f"#/$defs/{SHAPES}.{name}" for name in MEMBERS]
    assert outside["required"] == ["type"]
    assert schema["properties"]["shape"]["$ref"] == f"#/$defs/{SHAPES}"
    assert schema["properties"]["shapes"]["items"] == {"$ref": f"#/$defs/{SHAPES}"}
    square = schema["$defs"][f"{SHAPES}.square"]
    assert square["required"] == ["type", "side"]
    assert square["properties"]["type"]["const"] == "square"
    assert square["additionalProperties"] is False


def test_a_member_that_has_members_refers_to_its_folder_and_every_reference_is_defined():
    schema = json_schema(Config)
    group = schema["$defs"][f"{SHAPES}.group"]
    assert group["properties"]["parts"]["items"] == {"$ref": f"#/$defs/{SHAPES}"}
    assert group["properties"]["first"]["$ref"] == f"#/$defs/{SHAPES}"
    assert references(schema) <= {f"#/$defs/{name}" for name in schema["$defs"]}
    assert "x-folder" not in str(schema)


VALUES = {
    "output": 'a "b" \\ c',
    "shape": {"type": "group", "parts": [{"type": "square", "side": 2}, {"type": "circle"}]},
    "inks": [{"colour": "red"}, {}],
    "words": ["x"],
    "ranks": {"to_q.*": 4},
}


@pytest.mark.parametrize("values", [VALUES, {"output": "x", "shape": {"type": "circle"}}], ids=["much", "little"])
def test_an_annotated_file_loads_to_the_given_values_and_the_defaults(tmp_path, values):
    from tuner.plugins import read

    file = tmp_path / "annotated.toml"
    file.write_text(annotated_toml(Config, values))
    assert load(Config, file) == read(Config, values)


def test_an_annotated_file_says_every_field_its_description_and_its_default():
    text = annotated_toml(Config, {"output": "x", "shape": {"type": "circle"}})
    assert '# Where it goes.\noutput = "x"\n' in text
    assert "# How fast.\n#learning_rate = 0.0001\n" in text
    assert "# Where chance starts.\n#seed =  # not set\n" in text
    assert '# How exact.\n# One of: "fp32", "bf16".\n#precision = "bf16"\n' in text
    assert "# A colour's name.\n#\n# In English.\n#colour" in text
    assert "# What is drawn.\n# `type` is one of: circle, group, square.\n[shape]\n" in text
    assert "# The pen.\n[ink]\n" in text
    assert "# In millimetres.\nwidth = 2.0\n" in text  # the field's default is not the class's
    assert '[frame]\n# All points at one distance.\ntype = "circle"\n\n# The distance.\nradius = 3.0\n' in text
    assert "# Another pen.\n#[second_ink]\n" in text
    for name, doc in field_docs(Config).items():
        assert doc.split("\n")[0] in text
        assert name in text


def test_what_an_annotated_file_comments_out_is_the_default(tmp_path):
    """Taking the '#' away changes nothing."""
    values = {"output": "x", "shape": {"type": "circle"}}
    text = annotated_toml(Config, values)
    lines: list[str] = []
    in_table = True  # and not in one that is commented out as a whole
    for line in text.split("\n"):
        in_table = not line.startswith("#[") and (in_table or line.startswith("["))
        is_default = in_table and re.match(r"#\w+ = (?! # not set)", line)
        lines.append(line[1:] if is_default else line)
    file = tmp_path / "annotated.toml"
    file.write_text("\n".join(lines))
    (tmp_path / "plain.toml").write_text(text)
    assert "\nlearning_rate = 0.0001" in file.read_text()
    assert load(Config, file) == load(Config, tmp_path / "plain.toml")


def test_a_number_or_a_table_is_written_as_a_value():
    @dataclass(frozen=True)
    class Dot:
        size: float | Ink = 1.0

    assert annotated_toml(Dot, {}).split("\n")[-2] == "#size = 1.0"
    assert annotated_toml(Dot, {"size": {"width": 2.0}}).split("\n")[-2] == "size = { width = 2.0 }"
    assert len(json_schema(Dot)["properties"]["size"]["anyOf"]) == 2


def test_a_long_description_is_filled_to_the_line():
    @dataclass(frozen=True)
    class Long:
        field: int = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.config.schema.field_docs", lambda kind: {"field": "word\nword " * 15})
        assert annotated_toml(Long, {}) == "# " + "word " * 18 + "word\n# " + "word " * 10 + "word\n#field = 1\n"


def test_a_value_that_has_to_be_given_is_marked(tmp_path):
    text = annotated_toml(Config, {})
    assert "#output =  # has to be given\n" in text
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(ConfigError, match="output: missing"):
        load(Config, tmp_path / "my.toml")
