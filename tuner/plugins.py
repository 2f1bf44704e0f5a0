"""A folder is a registry: `type = "lora"` in a config names the module `tuner/methods/lora.py`.

Each module of such a folder ends with one line, `SPEC: type[Method] = Lora`. The type checker proves there that the
class fits the protocol, and this module finds it by name, importing only what a run uses. A dotted name
(`"my_package.my_method"`, or `"my_package.my_method:Class"`) reaches a class outside the project.

    AnyMethod = Annotated[Method, Folder("tuner.methods")]

As an annotation it tells pydantic how such a field is read and written: a table whose `type` picks the class.
"""

import functools
import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, LiteralString, TypeVar, cast

from pydantic import ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, ValidationError, core_schema

from tuner.errors import ConfigError, did_you_mean

T = TypeVar("T")

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""How every config is read: no coercion, no unknown key, no NaN."""
FOLDER_MARK = "x-folder"
"""In the JSON Schema of one class, stands for the members of a folder; `tuner.config.schema` writes them out."""


@functools.cache
def adapter(schema: type) -> TypeAdapter[tuple[Any]]:
    """What reads and writes a `schema`, inside a tuple of one: pydantic takes a config for everything but a class."""
    return TypeAdapter(tuple[schema], config=STRICT)  # pyright: ignore[reportInvalidTypeForm, reportUnknownArgumentType]


@dataclass(frozen=True)
class Folder:
    """Marks a config field whose class is chosen by its `type` key, from the modules of `package`."""

    package: str
    default: str | None = None
    """The name that a table without a `type` stands for; None: it has to say one."""
    without: tuple[str, ...] = ()
    """Members that do not belong where this mark stands."""

    def names(self) -> list[str]:
        """Every name that `type` may take, without importing any of them."""
        package = importlib.import_module(self.package)
        return sorted(
            module.name
            for module in pkgutil.iter_modules(package.__path__)
            if not module.ispkg and module.name not in ("base", *self.without) and not module.name.startswith("_")
        )

    def find(self, name: str, path: str = "type") -> type:
        """The class that `type = name` stands for; `path` is said in the message.

        Raises:
            ConfigError: no module of that name; the message lists the names there are.
        """
        try:
            return self._find(name)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error

    def name_of(self, kind: type) -> str:
        """The `type` that stands for `kind`, the inverse of `find`."""
        package, _, name = kind.__module__.rpartition(".")
        if package == self.package and importlib.import_module(kind.__module__).SPEC is kind:
            return name
        return f"{kind.__module__}:{kind.__qualname__}"

    def _find(self, name: str) -> type[Any]:
        if "." in name or ":" in name:
            return _outside(name)
        names = self.names()
        if name not in names:
            raise ValueError(f"no {name!r} here{did_you_mean(name, names)} (there are: {', '.join(names)})")
        return importlib.import_module(f"{self.package}.{name}").SPEC

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(self._serialize),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {FOLDER_MARK: {"package": self.package, "default": self.default, "without": list(self.without)}}

    def _validate(self, value: object) -> Any:
        """`value` as it is when it is an instance already, else the instance that the table `value` describes."""
        if is_dataclass(value) and not isinstance(value, type):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("expected", "expected a table with a 'type'")
        table = cast("dict[str, Any]", value)
        name = table.get("type", self.default)
        if name is None:
            raise _at_type("missing_type", f"missing; one of {', '.join(self.names())}", None)
        if not isinstance(name, str):
            raise _at_type("refused", f"expected one of {', '.join(self.names())}", name)
        try:
            kind = self._find(name)
        except ValueError as error:
            raise _at_type("refused", str(error), name) from error
        return read(kind, {key: item for key, item in table.items() if key != "type"})

    def _serialize(self, value: object) -> Mapping[str, Any]:
        return {"type": self.name_of(type(value)), **write(value)}


def read(schema: type[T], table: Mapping[str, Any]) -> T:
    """Plain data as an instance of the dataclass `schema`, strictly.

    Raises:
        pydantic.ValidationError: with every error in it; each path starts with a 0, the place in the tuple of one.
    """
    # As JSON, because there strictness still takes a list for a tuple and a string for a path.
    return adapter(schema).validate_json(json.dumps([table]))[0]


def write(value: object) -> dict[str, Any]:
    """A dataclass as plain data, the inverse of `read`; what is None is left out."""
    return adapter(type(value)).dump_python((value,), mode="json", exclude_none=True)[0]


def _outside(name: str) -> type:
    """The class that a dotted name stands for: `package.module` (its `SPEC`) or `package.module:Class`."""
    path, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"{name!r} is no 'package.module' or 'package.module:Class'")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ValueError(f"no module {path!r} can be imported") from error
    kind: object = getattr(module, attribute or "SPEC", None)
    if not isinstance(kind, type) or not is_dataclass(kind):
        raise ValueError(f"{path} has no dataclass {attribute or 'SPEC'!r}")
    return kind


def _at_type(kind: LiteralString, message: str, value: object) -> ValidationError:
    """An error of the `type` key, with its path."""
    error = PydanticCustomError(kind, "{message}", {"message": message})
    return ValidationError.from_exception_data("type", [InitErrorDetails(type=error, loc=("type",), input=value)])
