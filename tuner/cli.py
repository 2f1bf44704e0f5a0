"""The console command `tuner`: runs a recipe by its name in this process, or a tool that helps to write configs."""

# Nothing slow is imported before it is needed: `tuner --help` answers at once.
import argparse
import ast
import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from tuner import __version__
from tuner.errors import ConfigError, did_you_mean

T = TypeVar("T")
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "wandb")
PACKAGE = Path(__file__).parent
SHIPPED = PACKAGE / "shipped" / "recipes"
RECIPES = SHIPPED if SHIPPED.is_dir() else PACKAGE.parent / "recipes"
"""Where the recipes are: in an installed package, and in a checkout."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, this process's when `argv` is None; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if name in ("--version", "-V"):
        name = "version"
    if name in TOOLS:
        return TOOLS[name](rest)
    if name in recipes():
        return _run_recipe(name, rest)
    from tuner.config.command_line import guarded

    return guarded(lambda: _unknown(name))


def _run_recipe(name: str, argv: Sequence[str]) -> int:
    from tuner.config.command_line import INTERRUPTED, run

    try:
        with _nothing_collected():
            recipe = recipe_module(name)  # seconds: it imports torch and diffusers
    except KeyboardInterrupt:
        return INTERRUPTED
    if command := getattr(recipe, "command", None):
        return command(argv)
    return run(recipe.Config, recipe.main, argv, check=getattr(recipe, "check", None), name=f"tuner {name}")


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Look for no garbage meanwhile, nor later in what is imported: it stays, and looking takes a third of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def help_text() -> str:
    """What there is to run, a line each."""
    entries = {name: _file_doc(path) for name, path in recipes().items()}
    tools = {name: _first_line(tool.__doc__) for name, tool in TOOLS.items()}
    width = max(map(len, [*entries, *tools]))
    return "\n".join(
        [
            "usage: tuner RECIPE file.toml path=value ... [--check] [--print-config] [--debug]",
            "       tuner TOOL ...",
            "",
            "recipes:",
            *(f"  {name:<{width}}  {line}" for name, line in entries.items()),
            "",
            "tools:",
            *(f"  {name:<{width}}  {line}" for name, line in tools.items()),
            "",
            "`tuner NAME --help` says more. With several processes: accelerate launch -m tuner RECIPE file.toml ...",
            "",
        ]
    )


def recipes() -> dict[str, Path]:
    """The file of each recipe, by its name; a `_` at the end of a file's name is no part of it."""
    return {file.stem.rstrip("_"): file for file in sorted(RECIPES.glob("[!_]*.py"))}


def recipe_module(name: str) -> ModuleType:
    """Import a recipe.

    Raises:
        ConfigError: no recipe of that name.
    """
    if name not in recipes():
        _unknown(name, tools=False)
    module = recipes()[name].stem
    if RECIPES == SHIPPED:
        return importlib.import_module(f"tuner.shipped.recipes.{module}")
    if str(PACKAGE.parent) not in sys.path:  # a checkout that was installed to be edited
        sys.path.append(str(PACKAGE.parent))
    return importlib.import_module(f"recipes.{module}")


def read_config(kind: type[T], file: Path, overrides: Sequence[str] = ()) -> T:
    """A config file, as the recipe that it is for reads it; only those are asked whose config is a `kind`.

    Raises:
        ConfigError: none of them can read it; the message is of the one that comes nearest.
    """
    from tuner.config.loader import load

    problems: list[str] = []
    for name in recipes():
        config = getattr(recipe_module(name), "Config", None)
        if config is None or not issubclass(config, kind):
            continue
        try:
            return load(config, file, overrides)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError(min(problems, key=lambda text: text.count("\n")))


def schema(argv: Sequence[str]) -> int:
    """Print the JSON Schema of a recipe's config, for editors."""
    parser = argparse.ArgumentParser(prog="tuner schema", description=schema.__doc__, epilog=SCHEMA_USE)
    parser.add_argument("recipe", nargs="?", help="a recipe's name; all of them when left out")
    name: str | None = parser.parse_args(argv).recipe

    def body() -> None:
        import json

        from tuner.config.schema import json_schema

        names = list(recipes()) if name is None else [name]
        found = {name: json_schema(recipe_module(name).Config, title=f"tuner {name}") for name in names}
        print(json.dumps(found if name is None else found[name], indent=2, ensure_ascii=False))

    return _guarded(body)


def init(argv: Sequence[str]) -> int:
    """Write an annotated config for a recipe."""
    parser = argparse.ArgumentParser(prog="tuner init", description=init.__doc__)
    parser.add_argument("recipe", help="a recipe's name")
    parser.add_argument("--base", help="the model to start from: a hub id, a folder, or a name such as 'embedded'")
    parser.add_argument("--data", help="the folder of pictures")
    parser.add_argument("--out", type=Path, help="the file to write; standard output when left out")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="values to set")
    given = parser.parse_intermixed_args(argv)

    def body() -> None:
        text, missing = starter_toml(given.recipe, given.base, given.data, given.overrides)
        if given.out is None:
            print(text, end="")
        else:
            try:
                with given.out.open("x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                raise ConfigError(f"{given.out}: is there already; choose another name with --out") from None
            print(f"{given.out} is written; try: tuner {given.recipe} {given.out} --check", file=sys.stderr)
        for line in missing:
            print(f"still to be filled in: {line.removeprefix('command line: ')}", file=sys.stderr)

    return _guarded(body)


def starter_toml(
    recipe: str, base: str | None, data: str | None, overrides: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """An annotated config of `recipe`, with the values that its `starter(base, data)` gives and `overrides`.

    Returns: the TOML, and what has to be filled in before it loads, a line each.

    Raises:
        ConfigError: it would not load for another reason.
    """
    from tuner.config.loader import apply_overrides, decode
    from tuner.config.schema import annotated_toml

    module = recipe_module(recipe)
    values: dict[str, Any] = module.starter(base, data) if hasattr(module, "starter") else {}
    given = apply_overrides(values, overrides)
    missing: list[str] = []
    try:
        decode(module.Config, values, given)
    except ConfigError as error:
        missing = str(error).split("\n")
        if not all(line.endswith(": missing") for line in missing):
            raise
    head = f"# {_first_line(module.__doc__)}\n#\n# {INIT_USE.format(recipe=recipe)}\n\n"
    return head + annotated_toml(module.Config, values), [line.removesuffix(": missing") for line in missing]


def version(argv: Sequence[str]) -> int:
    """Print the versions of this program and of the libraries that it stands on."""
    argparse.ArgumentParser(prog="tuner version", description=version.__doc__).parse_args(argv)
    print(f"tuner {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for library in LIBRARIES:
        try:
            print(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{library} is not installed")
    return 0


def convert(argv: Sequence[str]) -> int:
    """Write a checkpoint of any kind as one safetensors file, or as a diffusers folder."""
    parser = argparse.ArgumentParser(prog="tuner convert", description=convert.__doc__, epilog=CONVERT_USE)
    parser.add_argument(
        "source", type=Path, help="a .safetensors, .ckpt, .pt or .bin file, an index of shards, a folder"
    )
    parser.add_argument("target", type=Path, help="the .safetensors file to write, or the diffusers folder")
    parser.add_argument(
        "--dtype", help="of the floating-point tensors: %(choices)s; theirs when left out", choices=FLOATS
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, help="whose names the tensors get, the original single files' or diffusers'"
    )
    parser.add_argument("--variant", help="which files of a diffusers folder to take, such as fp16")
    parser.add_argument(
        "--config", help="whose configs a folder gets: a released model's, such as sd2-base, or those of a folder"
    )
    parser.add_argument(
        "--add",
        type=Path,
        action="append",
        default=[],
        help="a file with a component that the source lacks, such as a text encoder; may be given several times",
    )
    parser.add_argument("--ema", action="store_true", help="take the averages that a single file holds (model_ema.…)")
    parser.add_argument("--overwrite", action="store_true", help="replace what has that name")
    given = parser.parse_args(argv)

    def body() -> None:
        from tqdm import tqdm

        from tuner.weights.convert import convert

        with tqdm(desc=given.source.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:

            def progress(written: int, total: int) -> None:
                bar.total = total
                bar.update(written - bar.n)

            options = {
                "dtype": given.dtype,
                "layout": given.layout,
                "variant": given.variant,
                "config": given.config,
                "add": given.add,
                "ema": given.ema,
                "overwrite": given.overwrite,
            }
            done = convert(given.source, given.target, **options, progress=progress)
        print(done)

    return _guarded(body)


INIT_USE = (
    "Lines that start with '#' and no space are the defaults. Run it with: tuner {recipe} THIS_FILE path=value ..."
)
SCHEMA_USE = (
    "Save it as lora.schema.json beside a config, and begin the config with the line '#:schema ./lora.schema.json': "
    "editors with a TOML language server complete keys and mark mistakes."
)
CONVERT_USE = (
    "Nothing in a pickled file (.ckpt, .pt, .pth, .bin) is run: its tensors are read where they lie. A file that would "
    "run something when it is opened by other programs is refused."
)
FLOATS = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
LAYOUTS = ("ldm", "diffusers")


TOOLS: dict[str, Callable[[Sequence[str]], int]] = {
    "convert": convert,
    "init": init,
    "schema": schema,
    "version": version,
}


def _guarded(body: Callable[[], None]) -> int:
    from tuner.config.command_line import guarded

    return guarded(body)


def _unknown(name: str, tools: bool = True) -> None:
    known = [*recipes(), *(TOOLS if tools else ())]
    raise ConfigError(f"command line: no {name!r} here{did_you_mean(name, known)} (there are: {', '.join(known)})")


def _file_doc(file: Path) -> str:
    """What a module says that it is, without importing it."""
    return _first_line(ast.get_docstring(ast.parse(file.read_text("utf-8"))))


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0]
