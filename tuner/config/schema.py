"""What a config class says about itself, for people and editors: its JSON Schema, and an annotated TOML file.

A field is described by the string below it:

    lr: float = 1e-4
    \"\"\"The learning rate.\"\"\"
"""

import ast
import functools
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import tomli_w
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from tuner.plugins import FOLDER_MARK, Folder, adapter, write

DIALECT = "https://json-schema.org/draft/2020-12/schema"


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """The description of each field of a dataclass, its own and the inherited ones; fields without one are left out."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        try:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, SyntaxError):  # made at run time, or its source is not at hand
            continue
        body = cast("ast.ClassDef", definition).body
        for statement, following in itertools.pairwise(body):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as text)):
                    docs[name] = inspect.cleandoc(text)
                case _:
                    pass
    return docs


def class_doc(kind: type) -> str:
    """The docstring of a class, without the one that `dataclass` makes up."""
    doc = kind.__dict__.get("__doc__") or ""
    return "" if doc.startswith(f"{kind.__name__}(") else inspect.cleandoc(doc)


# JSON Schema


def json_schema(schema: type, title: str = "") -> dict[str, Any]:
    """The JSON Schema of `schema`: what editors complete and check a TOML file by.

    A field whose class is chosen by its `type` refers to a definition named after its folder, which lists the
    members. All of them are imported.
    """
    body, definitions = _generate(schema, prefix="")
    seen: set[Folder] = set()
    while waiting := sorted(_folders([body, definitions]) - seen, key=_name):
        for folder in waiting:
            seen.add(folder)
            definitions |= _members(folder)
    document = {"$schema": DIALECT, **body, "title": title or schema.__name__, "$defs": definitions}
    return cast("dict[str, Any]", _resolved(document))


class _Generator(GenerateJsonSchema):
    """pydantic's generator, for TOML (which has no null) and with our descriptions."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        result = super().dataclass_schema(schema)
        kind = schema["cls"]
        result["additionalProperties"] = False
        if doc := class_doc(kind):
            result["description"] = doc
        for name, text in field_docs(kind).items():
            if name in result.get("properties", {}):
                result["properties"][name] = {**result["properties"][name], "description": text}
        return result

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        default = schema.get("default")
        if default is None or is_dataclass(default):
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def _generate(schema: type, prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON Schema of one class, and the definitions that it refers to, whose names start with `prefix`."""
    document = adapter(schema).json_schema(ref_template=f"#/$defs/{prefix}{{model}}", schema_generator=_Generator)
    definitions = {f"{prefix}{name}": value for name, value in document.get("$defs", {}).items()}
    (body,) = document["prefixItems"]
    reference = body.get("$ref")
    if reference is not None:
        name = reference.removeprefix("#/$defs/")
        body = definitions[name]
        if f"'{reference}'" not in str(definitions):  # only recursive classes refer to themselves
            del definitions[name]
    return dict(body), definitions


def _members(folder: Folder) -> dict[str, Any]:
    """The definitions of a folder and of its members."""
    definitions: dict[str, Any] = {}
    outside = {
        "description": "A class outside this project: 'my_package.my_module' or 'my_package.my_module:Class'.",
        "type": "object",
        "properties": {"type": {"type": "string", "pattern": "[.:]"}},
        "required": ["type"],
    }
    choices: list[dict[str, Any]] = []
    for name in folder.names():
        path = f"{folder.package}.{name}"
        body, inner = _generate(folder.find(name), prefix=f"{path}:")
        kind = {"const": name, "description": body.get("description", "")}
        body["properties"] = {"type": kind, **body.get("properties", {})}
        body["required"] = ["type", *body.get("required", [])]
        definitions |= {path: body} | inner
        choices.append({"$ref": f"#/$defs/{path}"})
        if name == folder.default:
            untyped = {key: value for key, value in body["properties"].items() if key != "type"}
            required = [key for key in body["required"] if key != "type"]
            choices.append({**body, "properties": untyped, "required": required})
    return definitions | {_name(folder): {"oneOf": [*choices, outside]}}


def _folders(node: object) -> set[Folder]:
    """The folders that a schema refers to."""
    if isinstance(node, dict):
        table = cast("dict[str, Any]", node)
        own: set[Folder] = {_marked(table[FOLDER_MARK])} if FOLDER_MARK in table else set()
        return own.union(*(_folders(value) for key, value in table.items() if key != FOLDER_MARK))
    return set[Folder]().union(*map(_folders, cast("list[Any]", node))) if isinstance(node, list) else set()


def _marked(mark: Mapping[str, Any]) -> Folder:
    """The folder that a schema's mark stands for."""
    return Folder(mark["package"], mark["default"], tuple(mark["without"]))


def _name(folder: Folder) -> str:
    """The name of a folder's definition: its package, and what is left out of it."""
    return " without ".join((folder.package, *folder.without))


def _resolved(node: object) -> object:
    """A schema whose marks of folders are references to their definitions."""
    if isinstance(node, dict):
        table = {key: _resolved(value) for key, value in cast("dict[str, Any]", node).items()}
        mark = cast("dict[str, Any] | None", table.pop(FOLDER_MARK, None))
        return table if mark is None else {"$ref": f"#/$defs/{_name(_marked(mark))}", **table}
    return [_resolved(value) for value in cast("list[Any]", node)] if isinstance(node, list) else node


# Annotated TOML


@dataclass(frozen=True)
class _Shape:
    """How a field is written: as a value, as a table (of a fixed class or a folder's), or as a list of tables."""

    kind: type | None = None
    folder: Folder | None = None
    repeated: bool = False

    @property
    def is_table(self) -> bool:
        return self.kind is not None or self.folder is not None


def annotated_toml(schema: type, values: Mapping[str, Any]) -> str:
    """A TOML file of every field of `schema`: its description as a comment, its default commented out, `values` set.

    Args:
        values: plain data, as TOML would give it; nested tables for nested classes, with their `type`.
    """
    return "\n".join(_section(schema, values, path="")).strip("\n") + "\n"


def _section(schema: type, values: Mapping[str, Any], path: str) -> Iterator[str]:
    """The lines of one table: first its values, then its tables."""
    hints = get_type_hints(schema, include_extras=True)
    members = [(field, _shape(hints[field.name])) for field in fields(schema) if field.init]
    for field, shape in members:
        if not shape.is_table:
            yield ""
            yield from _comment(field_docs(schema).get(field.name, ""))
            if choices := _choices(hints[field.name]):
                yield from _comment(f"One of: {', '.join(map(_inline, choices))}.")
            yield _assignment(field, values)
    for field, shape in members:
        if shape.is_table:
            inner = f"{path}.{field.name}" if path else field.name
            yield from _tables(field, shape, values, inner, field_docs(schema).get(field.name, ""))


def _assignment(field: Field[Any], values: Mapping[str, Any]) -> str:
    if field.name in values:
        return f"{field.name} = {_inline(values[field.name])}"
    if field.default is MISSING and field.default_factory is MISSING:
        return f"#{field.name} =  # has to be given"
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return f"#{field.name} =  # not set" if default is None else f"#{field.name} = {_inline(default)}"


def _tables(field: Field[Any], shape: _Shape, values: Mapping[str, Any], path: str, doc: str) -> Iterator[str]:
    """The table, or the tables, of one field."""
    header = f"[[{path}]]" if shape.repeated else f"[{path}]"
    given = _given(field, shape, values)
    yield ""
    yield from _comment(doc or (class_doc(shape.kind) if shape.kind else ""))
    if shape.folder is not None:
        yield from _comment(f"`type` is one of: {', '.join(shape.folder.names())}.")
    if not given:
        yield f"#{header}"
        if shape.kind is not None:
            yield from (f"#{line}" if line.startswith("[") else line for line in _section(shape.kind, {}, path))
    for number, table in enumerate(given):
        if number:
            yield ""
        yield header
        kind = shape.kind
        if shape.folder is not None:
            kind = shape.folder.find(table["type"], path)
            yield from _comment(class_doc(kind))
            yield f"type = {_inline(table['type'])}"
        assert kind is not None
        yield from _section(kind, table, path)


def _given(field: Field[Any], shape: _Shape, values: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The tables to write: those in `values`, else what of the default differs from its class's own defaults."""
    if field.name in values:
        given = values[field.name]
        return given if shape.repeated else [given]
    if field.default is MISSING and field.default_factory is MISSING:
        return [] if shape.folder is not None or shape.repeated else [{}]
    default: Any = field.default if field.default_factory is MISSING else field.default_factory()
    defaults = default if shape.repeated else [] if default is None else [default]
    return [_differing(value, shape.folder) for value in defaults]


def _differing(value: object, folder: Folder | None) -> dict[str, Any]:
    """What of a dataclass is not its class's default, as plain data."""
    kind = type(value)
    plain = write(value)
    try:
        usual = write(kind())
    except TypeError:  # has fields without a default
        usual = {}
    differing = {key: item for key, item in plain.items() if key not in usual or item != usual[key]}
    return differing if folder is None else {"type": folder.name_of(kind), **differing}


def _shape(hint: Any) -> _Shape:
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        folder = next((mark for mark in marks if isinstance(mark, Folder)), None)
        return _shape(inner) if folder is None else _Shape(folder=folder)
    if get_origin(hint) in (Union, types.UnionType):
        shapes = [_shape(member) for member in get_args(hint) if member is not type(None)]
        return shapes[0] if all(shape.is_table for shape in shapes) else _Shape()
    if get_origin(hint) in (tuple, list):
        element = _shape(get_args(hint)[0])
        return _Shape(element.kind, element.folder, repeated=True) if element.is_table else _Shape()
    return _Shape(kind=hint) if is_dataclass(hint) and isinstance(hint, type) else _Shape()


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values that a field may take, where its type lists them."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        return _choices(members[0]) if len(members) == 1 else ()
    return ()


def _comment(text: str) -> Iterator[str]:
    """A description as comment lines, each of its paragraphs filled anew."""
    for number, paragraph in enumerate(text.split("\n\n") if text else []):
        if number:
            yield "#"
        yield from (f"# {line}" for line in textwrap.wrap(paragraph, width=98))


def _inline(value: Any) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, Mapping):
        pairs = (f"{_pair(key, '')[:-5]} = {_inline(item)}" for key, item in cast("Mapping[str, Any]", value).items())
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, cast("Sequence[Any]", value))) + "]"
    return _pair("v", str(value) if isinstance(value, Path) else value)[4:]


def _pair(key: str, value: Any) -> str:
    """`key = value`, for a value that is no table or list."""
    return tomli_w.dumps({key: value}).rstrip("\n")
