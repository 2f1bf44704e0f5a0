"""Looks after the cache of latents and captions: lists what it holds, verifies it, or makes room.

tuner cache
tuner cache verify --remove
tuner cache prune --keep 20GB

Entries belong to all runs that see the same pictures and captions through the same networks. With them nothing is lost
but time: a run makes anew what it misses. Do not prune while a run is training.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuner.config.command_line import guarded, run
from tuner.data.cache import default_folder
from tuner.data.cache_tool import damaged, entries, prune, remove
from tuner.errors import ConfigError, DataError
from tuner.training.watchers import shown

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to do with which cache."""

    what: Literal["list", "verify", "prune"] = "list"
    """`list` counts, `verify` reads every entry, `prune` removes what was not asked for the longest."""
    folder: Path | None = None
    """The cache; `$TUNER_CACHE` or the user's own where left out."""
    keep: str | None = None
    """For `prune`: how much may stay, such as `20GB`."""
    remove: bool = False
    """For `verify`: remove what is damaged; it is made anew."""

    def __post_init__(self) -> None:
        if (self.keep is not None) != (self.what == "prune"):
            raise ValueError("keep goes with prune, which needs it, such as --keep 20GB")
        if self.remove and self.what != "verify":
            raise ValueError("remove goes with verify")
        if self.keep is not None and _size(self.keep) is None:
            raise ValueError(f"keep: {self.keep!r} is no size; give one such as 500MB or 20GB")


def main(config: Config) -> None:
    """List, verify or prune.

    Raises:
        DataError: there is no cache, or it is damaged and was not to be mended.
    """
    folder = config.folder or default_folder()
    if config.what == "verify":
        _verify(folder, config.remove)
        return
    every = list(entries(folder))
    if config.keep is not None:
        going = prune(every, _size(config.keep) or 0)
        for entry in going:
            remove(entry)
        gone = sum(entry.bytes for entry in going)
        print(f"{folder}: removed {len(going)} of {len(every)} entries, {gone / 1e9:.3f} GB")
        every = [entry for entry in every if entry not in going]
    for kind in sorted({entry.kind for entry in every}):
        of = [entry.bytes for entry in every if entry.kind == kind]
        print(f"{kind:<30} {len(of):>9} entries {sum(of) / 1e9:>10.3f} GB")
    print(f"{folder}: {sum(entry.bytes for entry in every) / 1e9:.3f} GB in {len(every)} entries")


def _verify(folder: Path, mend: bool) -> None:
    found = damaged(folder, shown)
    for path in found:
        print(f"damaged: {path}")
        if mend:
            path.unlink(missing_ok=True)
    if found and not mend:
        raise DataError(f"{folder}: {len(found)} entries are damaged; --remove has them made anew")
    print(f"{folder}: {f'removed {len(found)} damaged entries' if found else 'every entry is whole'}")


def _size(said: str) -> int | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", said.strip().upper())
    return None if found is None or found[2] not in UNITS else int(float(found[1]) * UNITS[found[2]])


def command(argv: Sequence[str]) -> int:
    """Run `tuner cache` with `argv`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="tuner cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=("list", "verify", "prune"), nargs="?", default="list")
    parser.add_argument("--folder", type=Path, help="the cache; $TUNER_CACHE or the user's own when left out")
    parser.add_argument("--keep", help="for prune: how much may stay, such as 20GB; what was used last stays")
    parser.add_argument("--remove", action="store_true", help="for verify: remove what is damaged; it is made anew")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    given = parser.parse_args(argv)

    def body() -> None:
        try:
            config = Config(what=given.what, folder=given.folder, keep=given.keep, remove=given.remove)
        except ValueError as error:
            raise ConfigError(f"--{error}") from None
        main(config)

    return guarded(body, debug=given.debug)


if __name__ == "__main__":
    raise SystemExit(run(Config, main))
