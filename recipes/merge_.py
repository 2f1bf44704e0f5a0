"""Merge checkpoints into a new one: interpolation, differences, sign consensus, and more.

The file's name ends in `_` so that it does not hide the package `merge` from recipes that are run as scripts.
"""

from merge.command import main as command
from merge.report import describe
from merge.run import Config, merge, plan, settings
from tuner.config.command_line import run


def main(config: Config) -> None:
    """Merge."""
    merge(config)


def check(config: Config) -> None:
    """Say what would be done, from headers alone."""
    print(describe(plan(config), settings(config)))


__all__ = ["Config", "check", "command", "main"]

if __name__ == "__main__":
    raise SystemExit(run(Config, main, check=check))
