"""Methods from outside of the project: which code they are is part of what a merge is.

The recipe names a class, and what that class does is in a file that may be another one tomorrow. So the recipe says the
content of that file too; of what the file imports it says nothing.
"""

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from merge.methods.base import MergeMethod
from tuner.errors import DataError

CODE = "code"
"""The recipe's key: SHA-256 of each file with methods from outside, by the module's name."""
OWN = f"{__name__.partition('.')[0]}."


def code_of(methods: Iterable[MergeMethod]) -> dict[str, str]:
    """The contents of the files that those of `methods` are in that are not the project's, by the module's name."""
    outside = sorted({type(method).__module__ for method in methods if not type(method).__module__.startswith(OWN)})
    return {name: _content(name) or "no file" for name in outside}


def refuse_other_code(recipe: Mapping[str, Any]) -> None:
    """Refuse a recipe whose methods from outside are in other files than those that it was made with; runs none.

    Raises:
        DataError: naming the module.
    """
    known = recipe.get(CODE, {})
    if not isinstance(known, dict):
        raise DataError(f"recipe: {CODE}: expected a table of modules; the header was changed, use another copy")
    for name, content in cast("dict[str, str]", known).items():
        found = _content(name) or "no file"
        if found == content:
            continue
        if found == "no file":
            raise DataError(f"{name}: the file with this method is not here; put it where Python finds it")
        raise DataError(
            f"{name}: is not the file that was used (SHA-256 {found[:16]}, expected {content[:16]}); put that one in "
            "its place"
        )


def _content(name: str) -> str | None:
    """The hash of a module's file; None where it has none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a package that is not there; a module that is no file's
        spec = None
    file = Path(spec.origin) if spec is not None and spec.origin is not None else None
    return hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else None
