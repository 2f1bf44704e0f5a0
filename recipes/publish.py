"""Publishes a finished run: its weights, a model card and sample pictures, and nothing else.

`--check` lists the files that would go, and sends none.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.config.command_line import run as run_command
from tuner.publish.card import check_license
from tuner.publish.provenance import Provenance, read_provenance
from tuner.publish.release import build
from tuner.publish.targets.base import AnyTarget


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


def main(config: Config) -> None:
    """Make the release folder and send what is in it."""
    folder = config.release / "release"
    show(folder, build(config.release, folder, provenance(config)))
    print(f"published: {config.target.publish(folder)}")


def check(config: Config) -> None:
    """List what would be sent."""
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / "release"
        show(folder, build(config.release, folder, provenance(config)))
    print(f"would go to: {config.target}")


def starter(base: str | None, data: str | None) -> dict[str, object]:
    """What `tuner init publish` writes uncommented."""
    return {"release": "runs/lora", "target": {"type": "folder", "path": "published/my-lora"}}


def provenance(config: Config) -> Provenance:
    """The run's, with what the config says over it."""
    if config.license is not None:
        check_license(config.license)
    said = {"title": config.title, "license": config.license, "trigger": config.trigger}
    return replace(read_provenance(config.release), **{key: text for key, text in said.items() if text is not None})


def show(folder: Path, files: list[Path]) -> None:
    """One line per file."""
    for name in files:
        print(f"{(folder / name).stat().st_size:>12,} bytes  {name.as_posix()}")


if __name__ == "__main__":
    raise SystemExit(run_command(Config, main, check=check))
