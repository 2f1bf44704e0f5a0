"""Says what a model is: a checkpoint, a LoRA, a merged model or a folder, from headers alone.

tuner inspect model.safetensors
tuner inspect folder --json

The file's name ends in `_` so that it does not hide Python's module `inspect` from recipes that are run as scripts.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge.description import describe, lines
from tuner.config.command_line import guarded, run


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to look at."""

    model: Path
    """A file, the index of shards, a diffusers folder, or peft's folder of a LoRA."""
    json: bool = False
    """Print everything as JSON, with the header's texts in full."""


def main(config: Config) -> None:
    """Look, and say."""
    found = describe(config.model)
    print(found.to_json() if config.json else "\n".join(lines(found)))


def command(argv: Sequence[str]) -> int:
    """Run `tuner inspect` with `argv`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="tuner inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, help="a file, the index of shards, or a folder")
    parser.add_argument("--json", action="store_true", help="everything as JSON, with the header's texts in full")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    given = parser.parse_args(argv)
    return guarded(lambda: main(Config(model=given.model, json=given.json)), debug=given.debug)


if __name__ == "__main__":
    raise SystemExit(run(Config, main))
