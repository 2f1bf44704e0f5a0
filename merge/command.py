"""`tuner merge`: a recipe file, or one method on a few files.

tuner merge recipe.toml [path=value ...] [--plan] [--resume]
tuner merge lerp a.safetensors b.safetensors t=0.3 to=out.safetensors
tuner merge ties a.safetensors b.safetensors base=sd15.safetensors density=0.2 to=out.safetensors
tuner merge methods [METHOD]             the methods, or all about one: its formula, source and settings
tuner merge diff a.safetensors b.safetensors [base=c.safetensors] [plot=diff.png]
tuner merge rebuild out.safetensors --sources folder
tuner merge tree out.safetensors         what it was made of

After the files come `to`, for methods that merge differences `base`, the method's own settings, and whatever a recipe
may say: dtype=bfloat16 rounding=stochastic t.blocks.M00=0.5 components.vae=b. A file is called by its name without the
ending. docs/merging.md tells of recipes.
"""

import argparse
import ast
import inspect
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from merge import diff, methods, provenance, rebuild, report, run
from merge.description import describe
from merge.run import Config
from tuner.config.command_line import guarded
from tuner.config.loader import apply_overrides, decode, load
from tuner.config.writer import to_toml
from tuner.errors import ConfigError, DataError
from tuner.plugins import Folder

METHODS = Folder("merge.methods")
RESULT = "merged"
BASE = "base"


def main(argv: Sequence[str]) -> int:
    """Run `tuner merge` with `argv`; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    words: list[str] = arguments.words

    def body() -> None:
        first = words[0] if words else ""
        if first == "rebuild":
            _rebuild(words[1:], arguments)
        elif first == "diff":
            diff.main(diff.read(words[1:]))
        elif first == "tree":
            _tree(words[1:])
        elif first == "methods":
            _methods(words[1:])
        else:
            _merge(words, arguments)

    return guarded(body, debug=arguments.debug)


def _merge(words: Sequence[str], arguments: argparse.Namespace) -> None:
    config = read(words)
    config = replace(config, overwrite=config.overwrite or arguments.overwrite)
    if arguments.print_config:
        print(to_toml(config), end="")
    elif arguments.plan or arguments.json:
        plan = run.plan(config)
        files = {} if config.single else run.files(config, plan).plans
        if arguments.json:
            print(run.plan_json(plan))
            return
        print(report.describe(plan, run.settings(config), config.verify))
        if there := run.in_the_way(config, plan):
            print(f"note: {there}; say --overwrite to replace it")
        for file, part in files.items():
            print(f"file {config.output / file}: {len(part.entries)} tensors, {part.value_bytes / 1e9:.2f} GB")
    else:
        run.merge(config, resume=arguments.resume)


def read(words: Sequence[str]) -> Config:
    """The config that the words of a command line mean.

    Raises:
        ConfigError: they mean none.
    """
    if not words:
        raise ConfigError("command line: give a recipe file, or a method and its files; see 'tuner merge --help'")
    first = words[0]
    if first.endswith(".toml"):
        return load(Config, Path(first), words[1:])
    if "=" in first and not Path(first).is_file():
        return load(Config, None, words)
    settable = {item.name for item in fields(METHODS.find(first, "command line"))}
    files = [word for word in words[1:] if "=" not in word or Path(word).exists()]
    settings = [word for word in words[1:] if word not in files]
    tree: dict[str, Any] = {"models": {}, "steps": [{"name": RESULT, "method": {"type": first}, "inputs": []}]}
    if base := next((setting.partition("=")[2] for setting in settings if setting.startswith("base=")), None):
        tree["models"][BASE] = base
        tree["steps"][0]["base"] = BASE
    for file in files:
        name = _name(file, tree["models"])
        tree["models"][name] = file
        tree["steps"][0]["inputs"].append(name)
    own = {field.name for field in fields(Config)}
    overrides: list[str] = []
    for setting in settings:
        path, _, value = setting.partition("=")
        match path:
            case "to":
                overrides.append(f"output={value}")
            case "base":
                pass
            case _ if path.split(".")[0] in own - settable:
                overrides.append(setting)
            case _:
                overrides.append(f"steps.0.method.{setting}")
    if not any(override.startswith("output=") for override in overrides):
        raise ConfigError("command line: to: missing; say where the result goes, such as to=out.safetensors")
    given = apply_overrides(tree, overrides)
    return decode(Config, tree, given)


def _name(file: str, models: dict[str, str]) -> str:
    """What a file is called in the recipe: its name without its ending, numbered where that is taken."""
    stem = Path(file).stem.split(".safetensors")[0] or "model"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next(name for name in names if name not in (*models, RESULT, run.LEFT_OUT))


def _rebuild(words: Sequence[str], arguments: argparse.Namespace) -> None:
    if len(words) != 1 or arguments.sources is None:
        raise ConfigError("command line: tuner merge rebuild FILE --sources FOLDER [--to FILE]")
    made = Path(words[0])
    name = f"{made.name}-rebuilt" if made.is_dir() else f"{made.stem}-rebuilt.safetensors"
    output = arguments.to or made.with_name(name)
    rebuild.rebuild(made, arguments.sources, output, resume=arguments.resume, overwrite=arguments.overwrite)


def _tree(words: Sequence[str]) -> None:
    if len(words) != 1:
        raise ConfigError("command line: tuner merge tree FILE")
    found = describe(Path(words[0])).ancestors
    if found is None:
        raise DataError(f"{words[0]}: its header holds no recipe; it was not made by 'tuner merge'")
    print("\n".join(provenance.lines(found)))


def _methods(words: Sequence[str]) -> None:
    """List the methods, or say all about one: its formula and source, and its settings with their defaults."""
    if not words:
        names = METHODS.names()
        width = max(map(len, names))
        for name in names:
            file = Path(methods.__path__[0]) / f"{name}.py"
            doc = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
            print(f"{name:<{width}}  {doc.splitlines()[0]}")
        return
    kind = METHODS.find(words[0], "command line")
    takes = ", ".join(space.value for space in kind.takes) + (", ..." if kind.repeats else "")
    print(f"{words[0]}: takes {takes}; gives {kind.gives.value}\n")
    print(inspect.getdoc(inspect.getmodule(kind)) or "")
    print("\n" + (inspect.getdoc(kind) or "") + "\n\nsettings and their defaults:")
    for item in fields(kind):
        print(f"    {item.name}" + ("" if item.default is MISSING else f" = {item.default!r}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tuner merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="recipe.toml | METHOD FILE ... | diff | rebuild | tree | methods")
    parser.add_argument("--plan", action="store_true", help="say what would be done, from headers alone")
    parser.add_argument("--json", action="store_true", help="the plan, tensor by tensor, as JSON")
    parser.add_argument("--resume", action="store_true", help="go on with a merge that was interrupted")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that another recipe has made")
    parser.add_argument("--print-config", action="store_true", help="print the recipe with all its defaults, and stop")
    parser.add_argument("--sources", type=Path, help="rebuild: the folder with the models")
    parser.add_argument("--to", type=Path, help="rebuild: the file to write")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser
