"""Laws over the recipes' configs: each can be read, written, described and begun with."""

import ast
import dataclasses
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest

from tuner import cli
from tuner.config.loader import load
from tuner.config.schema import class_doc, field_docs, json_schema
from tuner.plugins import Folder

RECIPES = sorted(cli.recipes())


def classes(hint: Any, within: tuple[type, ...] = ()) -> Iterator[type]:
    """Every config class that a value of type `hint` may hold, the members of folders included.

    A class that may hold itself is looked into once.
    """
    if get_origin(hint) is Annotated:
        folder = next((mark for mark in get_args(hint)[1:] if isinstance(mark, Folder)), None)
        if folder is None:
            yield from classes(get_args(hint)[0], within)
        for name in [] if folder is None else folder.names():
            yield from classes(folder.find(name), within)
    elif dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        if hint not in within:
            yield hint
            for inner in get_type_hints(hint, include_extras=True).values():
                yield from classes(inner, (*within, hint))
    else:
        for inner in get_args(hint):
            yield from classes(inner, within)


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_is_in_a_line_and_is_a_program(name):
    source = cli.recipes()[name].read_text("utf-8")
    first, *_ = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")
    assert first.endswith(".") and "\n" not in first
    assert source.rstrip().split("\n")[-2] == 'if __name__ == "__main__":'
    assert dataclasses.is_dataclass(cli.recipe_module(name).Config)


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_of_a_config_is_described_by_itself_or_by_its_class(name):
    for kind in set(classes(cli.recipe_module(name).Config)):
        for field in dataclasses.fields(kind):
            hint = get_type_hints(kind)[field.name]
            described = field.name in field_docs(kind) or (dataclasses.is_dataclass(hint) and class_doc(hint))
            assert described, f"{kind.__name__}.{field.name} has no string below it"


@pytest.mark.parametrize("name", RECIPES)
def test_what_may_be_absent_is_absent_by_default(name):
    """TOML has no null: a written config leaves None out, and has to read back to None."""
    for kind in set(classes(cli.recipe_module(name).Config)):
        for field in dataclasses.fields(kind):
            hint = get_type_hints(kind)[field.name]
            if get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
                assert field.default is None, f"{kind.__name__}.{field.name} may be None, which is not its default"


@pytest.mark.parametrize("name", RECIPES)
def test_the_json_schema_of_a_recipe_defines_all_that_it_refers_to(name):
    schema = json_schema(cli.recipe_module(name).Config)
    assert references(schema) <= {f"#/$defs/{name}" for name in schema["$defs"]}


@pytest.mark.parametrize("name", RECIPES)
def test_init_writes_a_config_and_a_training_recipes_loads_and_prints_as_itself(name, tmp_path, capsys):
    file, printed = tmp_path / "new.toml", tmp_path / "printed.toml"
    assert cli.main(["init", name, "--base", "pocket", "--data", "pictures", "--out", str(file)]) == 0
    config = cli.recipe_module(name).Config
    if "data" not in config.__dataclass_fields__:
        return  # it does not train: what it needs is not a base and pictures
    capsys.readouterr()
    assert cli.main([name, str(file), "--print-config"]) == 0
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load(config, printed) == load(config, file)
