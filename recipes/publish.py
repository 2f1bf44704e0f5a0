"""Publishes a finished run: its weights, a model card and sample pictures, and nothing else.

`--check` lists the files that would go, and sends none.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.config.command_line import run as run_command
from tuner.errors import ConfigError
from tuner.publish.card import check_license
from tuner.publish.provenance import Provenance, read_provenance
from tuner.publish.release import build
from tuner.publish.targets.base import AnyTarget

SAID = ("title", "license", "trigger", "description", "author", "tags", "usage_hint", "negative")
"""What is said here, and no run knows."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Publishing."""

    release: Path
    """The output folder of a finished run."""
    target: AnyTarget
    """Where it goes."""
    title: str | None = None
    """What the card calls it; the run's name where left out."""
    license: str | None = None
    """The Hub's name of the licence that you give these weights, such as "cc-by-4.0"; not stated where left out."""
    trigger: str | None = None
    """The words that call what was learned; the run's own where left out."""
    description: str | None = None
    """What it is, in a few sentences."""
    author: str | None = None
    """Who made it, as you want to be called."""
    tags: tuple[str, ...] = ()
    """What it is to be found by, such as ["anime", "portrait"]."""
    usage_hint: str | None = None
    """How it is best used, such as the strengths that it is good at."""
    negative: bool = False
    """Of new words: whether they belong into negative prompts."""
    thumbnail: bool = True
    """Whether the first of its pictures, made small, is put into the files' headers, where programs look for it."""

    def __post_init__(self) -> None:
        if wrong := [tag for tag in self.tags if "," in tag or not tag.strip() or not tag.isprintable()]:
            raise ValueError(f"tags: {wrong[0]!r}: a tag is a word or some, without a comma; split it")


def main(config: Config) -> None:
    """Make the release folder and send what is in it."""
    folder = config.release / "release"
    show(folder, build(config.release, folder, provenance(config), config.thumbnail))
    print(f"published: {config.target.publish(folder)}")


def check(config: Config) -> None:
    """List what would be sent."""
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / "release"
        show(folder, build(config.release, folder, provenance(config), config.thumbnail))
    print(f"would go to: {config.target}")


def starter(base: str | None, data: str | None) -> dict[str, object]:
    """What `tuner init publish` writes uncommented."""
    return {"release": "runs/lora", "target": {"type": "folder", "path": "published/my-lora"}}


def provenance(config: Config) -> Provenance:
    """The run's, with what the config says over it."""
    if config.license is not None:
        check_license(config.license)
    run = read_provenance(config.release)
    if config.negative and not run.tokens:
        raise ConfigError("negative: only new words can belong into negative prompts; leave it out")
    said = {name: getattr(config, name) for name in SAID}
    return replace(run, **{name: text for name, text in said.items() if text not in (None, (), False)})


def show(folder: Path, files: list[Path]) -> None:
    """One line per file."""
    for name in files:
        print(f"{(folder / name).stat().st_size:>12,} bytes  {name.as_posix()}")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main, check=check))
