"""The command line of a recipe: `recipe.py file.toml path=value ... [--check] [--print-config] [--debug]`.

A recipe module has a docstring whose first line says what it does, a frozen dataclass `Config`, a function
`main(config)` and, where it has one, a function `check(config)` for `--check`, and ends with

    if __name__ == "__main__":
        raise SystemExit(run(Config, main, check=check))
"""

import argparse
import errno
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tuner.config.loader import load
from tuner.config.writer import to_toml
from tuner.errors import ConfigError, ResourceError, UserError

T = TypeVar("T")

INTERRUPTED = 130
BUG = 1
REMEDIES = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "free some space, or choose another folder",
    errno.EFBIG: "raise the limit on file sizes, or choose another folder",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its permissions, or choose another folder",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close programs that keep many files open",
    errno.ENOMEM: "close other programs, or use a smaller batch",
}
OUT_OF_MEMORY = (
    "out of memory: set a smaller micro-batch (the result stays the same), turn gradient checkpointing on, "
    "or lower the resolution"
)
REPORT = "This is a bug, not a mistake of yours: please report it with the lines above."


def run(
    schema: type[T],
    main: Callable[[T], None],
    argv: Sequence[str] | None = None,
    *,
    check: Callable[[T], None] | None = None,
    name: str | None = None,
) -> int:
    """Read the config that `argv` names, run `main` (or `check`) on it, and turn what goes wrong into an exit code.

    Args:
        argv: the arguments after the program's name; those of this process when None.
        check: for `--check`, which reads config and data and says what a run would do, but trains nothing.
            Without one, `--check` only reads the config and prints it.
        name: how the help calls the program; the script's name when None.

    Returns: 0, or the exit code of the error (`tuner.errors`), 130 for Ctrl-C, 1 for a bug.
    """
    parser = _parser(main, name)
    try:
        arguments = parser.parse_intermixed_args(argv)
    except SystemExit as error:  # argparse has said what is wrong, or shown its help
        return error.code if isinstance(error.code, int) else 2
    with_file = bool(arguments.config) and ("=" not in arguments.config[0] or Path(arguments.config[0]).is_file())
    file = Path(arguments.config[0]) if with_file else None

    def body() -> None:
        config = load(schema, file, arguments.config[with_file:])
        if arguments.print_config or (arguments.check and check is None):
            print(to_toml(config), end="")
        elif arguments.check and check is not None:
            check(config)
        else:
            main(config)

    return guarded(body, debug=arguments.debug)


def guarded(body: Callable[[], None], *, debug: bool = False) -> int:
    """Run `body`; what a user can act on becomes a line on stderr and an exit code, a bug keeps its traceback.

    In a run of several processes only the first shows a `ConfigError`, which all of them meet.
    """
    try:
        body()
    except KeyboardInterrupt:
        _print("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # who read our output has seen enough of it, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        known = as_user_error(error)
        if debug or known is None:
            traceback.print_exc()
        if known is None:
            print(REPORT, file=sys.stderr)
            return BUG
        if not isinstance(known, ConfigError) or _rank() == 0:
            for line in str(known).split("\n"):
                _print(f"error: {line}")
        return known.exit_code
    return 0


def as_user_error(error: BaseException) -> UserError | None:
    """The error that a user can act on, which `error` is or was caused by; None for a bug."""
    if isinstance(error, UserError):
        return error
    if isinstance(error.__cause__, UserError):
        return error.__cause__
    cause: BaseException | None = error
    while cause is not None:
        if scarce := _scarce(cause):
            return scarce
        cause = cause.__cause__ or cause.__context__
    return None


def _scarce(error: BaseException) -> ResourceError | None:
    """The lack of disk, memory, handles or rights that `error` tells of."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return ResourceError(OUT_OF_MEMORY)
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch, on a CPU
        return ResourceError(OUT_OF_MEMORY)
    if isinstance(error, OSError) and error.errno in REMEDIES:
        place = f"{error.filename}: " if error.filename else ""
        return ResourceError(f"{place}{os.strerror(error.errno).lower()}; {REMEDIES[error.errno]}")
    # A library in another language says it in words, such as "No space left on device (os error 28)".
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number and int(number[1]) in REMEDIES:
        return ResourceError(f"{_short(str(error))}; {REMEDIES[int(number[1])]}")
    return None


def _short(text: str) -> str:
    return text.replace("\n", " ")[:300]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _print(line: str) -> None:
    """One line on stderr, named by its process when there are several, without what would steer a terminal."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    print(f"[process {_rank()}] {text}" if several else text, file=sys.stderr, flush=True)


def _parser(main: Callable[..., None], name: str | None) -> argparse.ArgumentParser:
    module = inspect.getmodule(main)
    parser = argparse.ArgumentParser(
        prog=name,
        description=module and module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="*", metavar="file.toml path=value", help="the config, and values to set in it")
    parser.add_argument("--check", action="store_true", help="say what the run would do, and stop before it")
    parser.add_argument("--print-config", action="store_true", help="print the config with all its defaults, and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser
