"""TOML to frozen dataclasses: strict, typed, and every error named by its file, line and dotted path.

The dataclasses are the schema; there is no second description of a field anywhere. Values keep the type that they are
declared with (a whole number is also a float; nothing else is converted), unknown keys are errors, a list may be a
tuple, a string a path, and a field marked with a `tuner.plugins.Folder` picks its class by its `type` key. A key that
may be absent is declared `X | None = None`. Relative paths are relative to the working directory.
"""

import datetime
import re
import tomllib
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic_core import ErrorDetails, ValidationError

from tuner.errors import ConfigError, did_you_mean
from tuner.plugins import Folder, read

T = TypeVar("T")
Key = tuple[str | int, ...]
"""Where a value is: names of keys, and indexes into lists."""

COMMAND_LINE = "command line"
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "path_type": "a path",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "dataclass_type": "a table",
}


def load(schema: type[T], file: Path | None, overrides: Sequence[str] = ()) -> T:
    """Read `file` as a `schema`, after overrides such as `"optimizer.lr=1e-5"`; without a file, the overrides alone.

    An override's value is TOML, and text where it is not valid TOML or where the field is text.

    Raises:
        ConfigError: unknown or missing keys, values of a wrong type, or values that a dataclass itself rejects:
            all of them, one per line, each starting with its file and line (or `command line`) and its dotted path.
    """
    text = "" if file is None else _read_text(file)
    tree = _parse(text, file)
    given = apply_overrides(tree, overrides)
    return decode(schema, tree, given, file, text)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[Key, str]:
    """Put overrides into `tree`, in their order; where each went, and its text.

    Raises:
        ConfigError: one that is no `path=value`, or whose path leads into something that is no table or list.
    """
    return dict(_apply(tree, override) for override in overrides)


def decode(schema: type[T], tree: dict[str, Any], given: dict[Key, str], file: Path | None = None, text: str = "") -> T:
    """The `schema` that `tree` describes, which came from `text` in `file` and from the overrides `given`.

    Raises:
        ConfigError: as `load`.
    """
    problems: dict[Key, str] = dict(_quote_dates(tree, ()))
    try:
        config = read(schema, tree)
    except ValidationError as error:
        if _as_text(tree, given, error):
            return decode(schema, tree, given, file, text)
        problems = _problems(schema, tree, error) | problems
    else:
        if not problems:
            return config
    lines = {} if file is None else _line_index(text)
    raise ConfigError("\n".join(_say(problems, file, lines, given)))


# Reading


def _read_text(file: Path) -> str:
    if not file.exists():
        siblings = [path.name for path in file.parent.glob("*.toml")] if file.parent.is_dir() else []
        raise ConfigError(f"{file}: no such file{did_you_mean(file.name, siblings)}")
    if not file.is_file():
        raise ConfigError(f"{file}: not a file; give the path of a .toml file")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None


def _parse(text: str, file: Path | None) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        reason, _, position = str(error).rpartition(" (at ")
        line = re.search(r"line (\d+)", position)
        number = int(line[1]) if line else text.count("\n") + 1
        source = text.split("\n")[number - 1].strip()
        hint = {
            "Cannot overwrite a value": "this key is given twice",
            "Invalid value": "this is no TOML value; text needs quotes, and there is no null: leave the key out",
        }.get(reason) or f"not valid TOML: {(reason or str(error))[:1].lower()}{(reason or str(error))[1:]}"
        raise ConfigError(f"{file}:{number}: {_short(source)}: {hint}") from None


def _quote_dates(tree: Any, key: Key) -> Iterator[tuple[Key, str]]:
    """Turn dates and times into text, and name each: no config has one, so it is text that lacks its quotes."""
    for part, value in _entries(tree):
        if isinstance(value, datetime.date | datetime.time):
            tree[part] = value.isoformat()
            yield (*key, part), f"expected no date or time, got {tree[part]}; put it in quotes if it is text"
        elif isinstance(value, dict | list):
            yield from _quote_dates(value, (*key, part))


def _entries(node: object) -> list[tuple[str | int, Any]]:
    """The values in a table or a list, each with its key or index."""
    if isinstance(node, dict):
        return list(cast("dict[str, Any]", node).items())
    return list(enumerate(cast("list[Any]", node))) if isinstance(node, list) else []


# Overrides


def _apply(tree: dict[str, Any], override: str) -> tuple[Key, str]:
    """Put an override into `tree`; where, and its text."""
    if not override.isprintable() and any("\ud800" <= character <= "\udfff" for character in override):
        raise ConfigError(f"{COMMAND_LINE}: {override!r}: not UTF-8 text")  # bytes that the terminal sent as they were
    path, equals, text = override.partition("=")
    parts = _split(path.strip())
    if not equals or not parts:
        raise ConfigError(f"{COMMAND_LINE}: {override!r}: an override reads path=value, such as optimizer.lr=1e-4")
    node: Any = tree
    key: Key = ()
    for part in parts[:-1]:
        index = _index(node, part, key)
        key = (*key, index)
        if isinstance(node, dict):
            node = cast("dict[str, Any]", node).setdefault(part, {})
        else:
            node = node[index]
    index = _index(node, parts[-1], key)
    node[index] = _value(text)
    return (*key, index), text


def _split(path: str) -> list[str]:
    """The keys of a dotted path, which may be quoted as in TOML; none if it is no path."""
    try:
        node: Any = tomllib.loads(f"{path} = 0")
    except tomllib.TOMLDecodeError:
        return []
    parts: list[str] = []
    while isinstance(node, dict):
        entries = list(cast("dict[str, Any]", node).items())
        if len(entries) != 1:  # several lines, or a comment
            return []
        part, node = entries[0]
        parts.append(part)
    return parts


def _index(node: object, part: str, key: Key) -> str | int:
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError(f"{COMMAND_LINE}: {_dotted((*key, part))}: {_dotted(key)} is a value, not a table")
    count = len(cast("list[Any]", node))
    if not part.isdecimal() or int(part) >= count:
        raise ConfigError(
            f"{COMMAND_LINE}: {_dotted((*key, part))}: {_dotted(key)} is a list of {count}; number its entries from 0"
        )
    return int(part)


def _value(text: str) -> Any:
    """The TOML value that `text` is, else `text` itself."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    value = table.pop("value")
    return text if table or isinstance(value, datetime.date | datetime.time) else value


def _as_text(tree: dict[str, Any], given: dict[Key, str], error: ValidationError) -> bool:
    """Put overrides of text fields back as the text that they are (`run.name=2026`); whether there were any."""
    found = False
    for details in error.errors(include_url=False):
        key = _key(tree, details)
        if (
            details["type"] in ("string_type", "path_type")
            and key in given
            and isinstance(details["input"], int | float)
        ):
            node: Any = tree
            for part in key[:-1]:
                node = node[part]
            node[key[-1]] = given[key]
            found = True
    return found


# Explaining


def _problems(schema: type, tree: dict[str, Any], error: ValidationError) -> dict[Key, str]:
    """What is wrong at each place."""
    expected: dict[Key, list[str]] = {}
    got: dict[Key, Any] = {}
    problems: dict[Key, str] = {}
    for details in error.errors(include_url=False):
        key = _key(tree, details)
        match details["type"]:
            case "missing":
                problems[key] = "missing"
            case "unexpected_keyword_argument":
                known = _field_names(schema, tree, key[:-1])
                hint = did_you_mean(str(key[-1]), known)
                problems[key] = "unknown key" + (hint or f"; the keys here are {', '.join(known)}")
            case "value_error":
                problems[key] = str(details.get("ctx", {}).get("error"))
            case "literal_error" | "enum":
                choices = str(details.get("ctx", {}).get("expected"))
                expected.setdefault(key, []).append(f"one of {choices}" if " or " in choices else choices)
                got[key] = details["input"]
            case kind if kind in EXPECTED:
                expected.setdefault(key, []).append(EXPECTED[kind])
                got[key] = details["input"]
            case _:
                problems[key] = details["msg"]
    for key, wanted in expected.items():
        if isinstance(got[key], dict) and (
            key in problems or any(_below(key, place) for place in [*problems, *expected])
        ):
            continue  # a number or a table may stand here, and a table does: what is wrong in it is said
        problems[key] = (
            f"expected {' or '.join(dict.fromkeys(wanted))}, got {_show(got[key])}{_quotes(wanted, got[key])}"
        )
    return problems


def _below(key: Key, place: Key) -> bool:
    """Whether `place` is inside of what stands at `key`."""
    return len(place) > len(key) and place[: len(key)] == key


def _key(tree: dict[str, Any], details: ErrorDetails) -> Key:
    """Where in `tree` an error is: its path without the parts that name a union's member or a place in a tuple."""
    node: object = tree
    key: Key = ()
    parts = details["loc"]
    for position, part in enumerate(parts):
        absent = details["type"] in ("missing", "missing_type") and position == len(parts) - 1
        if isinstance(node, dict) and isinstance(part, str) and (part in node or absent):
            node = cast("dict[str, object]", node).get(part)
        elif isinstance(node, list) and isinstance(part, int):
            node = None if absent else cast("list[object]", node)[part]
        else:
            continue
        key = (*key, part)
    return key


def _field_names(schema: Any, tree: Any, key: Key) -> list[str]:
    """The fields of the dataclass at `key`."""
    schema = _class_of(schema, tree)
    for part in key:
        if is_dataclass(schema):
            schema = get_type_hints(schema, include_extras=True)[str(part)]
        else:
            arguments = get_args(schema)
            schema = arguments[1] if get_origin(schema) is dict else arguments[0]
        tree = tree[part]
        schema = _class_of(schema, tree)
    return [field.name for field in fields(schema) if field.init] if is_dataclass(schema) else []


def _class_of(schema: Any, tree: Any) -> Any:
    """`schema` without its `Annotated` and `| None`, and the class itself where a `type` picks it."""
    if get_origin(schema) is Annotated:
        inner, *marks = get_args(schema)
        folder = next((mark for mark in marks if isinstance(mark, Folder)), None)
        return _class_of(inner, tree) if folder is None else folder.find(tree.get("type", folder.default))
    if get_origin(schema) in (Union, types.UnionType):
        members = [member for member in get_args(schema) if member is not type(None)]
        tables = [
            member for member in members if is_dataclass(member) or get_origin(member) in (Annotated, dict, tuple)
        ]
        return _class_of((tables or members)[0], tree)
    return schema


def _show(value: object) -> str:
    """A value for a message."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    return _short(repr(value))


def _short(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _quotes(wanted: list[str], got: object) -> str:
    if isinstance(got, str) and not isinstance(_value(got), str):
        return "; remove the quotes"
    if isinstance(got, int | float) and any(words in ("text", "a path") for words in wanted):
        return "; put it in quotes"
    return ""


def _say(problems: dict[Key, str], file: Path | None, lines: dict[Key, int], given: dict[Key, str]) -> Iterator[str]:
    """A line for each problem, in the order of the file and then of the overrides."""
    entries: list[tuple[tuple[int, int], str]] = []
    overridden = list(given)
    for key, problem in problems.items():
        prefixes = [key[:length] for length in range(len(key), 0, -1)]
        override = next((overridden.index(prefix) for prefix in prefixes if prefix in given), None)
        line = next((lines[prefix] for prefix in prefixes if prefix in lines), 0)
        if override is not None or file is None:
            order, place = (1, -1 if override is None else override), COMMAND_LINE
        else:
            order, place = (0, line), f"{file}:{line}" if line else str(file)
        entries.append((order, f"{place}: {_dotted(key)}: {problem}" if key else f"{place}: {problem}"))
    for _, entry in sorted(entries, key=lambda entry: entry[0]):
        yield entry


def _dotted(key: Key) -> str:
    return ".".join(str(part) if re.fullmatch(r"[\w-]+", str(part)) else repr(part) for part in key)


def _line_index(text: str) -> dict[Key, int]:
    """The line where each key of a valid TOML text is said, to a good approximation: a statement's first line."""
    index: dict[Key, int] = {}
    counts: dict[Key, int] = {}  # how often each array of tables was opened
    table: Key = ()
    start, statement = 0, ""
    for number, line in enumerate(text.split("\n"), start=1):
        if not statement and (not line.strip() or line.lstrip().startswith("#")):
            continue
        if not statement:
            start = number
        elif not re.search(r"[\]}]|\"\"\"|'''", line):
            statement += "\n" + line
            continue  # what a value is that spans lines, none of these ends
        statement += ("\n" if statement else "") + line
        try:
            parsed = tomllib.loads(statement)  # a statement is the fewest lines that are TOML by themselves
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            table = _header(parsed, counts, repeated=statement.lstrip().startswith("[["))
            index.setdefault(table, start)
        else:
            _index_keys(parsed, table, start, index)
        statement = ""
    return index


def _header(parsed: dict[str, Any], counts: dict[Key, int], repeated: bool) -> Key:
    """The key of the table that a header such as `[a.b]` or `[[a]]` opens."""
    key: list[str | int] = []
    while parsed:
        part, value = next(iter(parsed.items()))
        key.append(part)
        if repeated and isinstance(value, list):
            counts[tuple(key)] = counts.get(tuple(key), 0) + 1
        if tuple(key) in counts:
            key.append(counts[tuple(key)] - 1)
        parsed = {} if isinstance(value, list) else value
    return tuple(key)


def _index_keys(node: object, key: Key, line: int, index: dict[Key, int]) -> None:
    for part, value in _entries(node):
        index.setdefault((*key, part), line)
        _index_keys(value, (*key, part), line, index)
