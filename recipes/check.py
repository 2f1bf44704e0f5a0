"""Audits the data of a training config: what is wrong with it, and what the model will see of it.

tuner check my-lora.toml
tuner check my-lora.toml pictures.resolution=768 --report audit --samples 16

It reads every picture and caption, says all that is wrong, and writes a page to look at (report.html) with the same as
JSON beside it. Exit codes: 0 when nothing is wrong, 10 for warnings, 3 for errors.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuner.audit.audit import Report, audit
from tuner.audit.findings import SEVERITIES
from tuner.cli import read_config
from tuner.config.command_line import guarded, run
from tuner.data.buckets import Buckets
from tuner.data.cache import Cache, address, default_folder
from tuner.families.base import OpenedModel
from tuner.training.observers.validation import Validation
from tuner.training.recipe import Training, held_out_share
from tuner.training.run import base_contents, chosen_buckets
from tuner.training.watchers import shown

WRONG, WARNED = 3, 10
"""The exit codes where there are errors, and where there are only warnings."""
LISTED = 20
"""Findings of a kind that are printed; the report has them all."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to audit."""

    config: Path
    """A training recipe's config file."""
    overrides: tuple[str, ...] = ()
    """Values put over those of the file, as on a recipe's command line: `path=value`."""
    report: Path | None = None
    """The folder of report.html and report.json; `check` in the run's output where left out."""
    samples: int = 8
    """How many showings are looked at closely."""

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ValueError(f"samples must not be negative, got {self.samples}")


def main(config: Config) -> None:
    """Look, say, and write the report.

    Raises:
        SystemExit: with 3 where there are errors, with 10 where there are warnings.
    """
    if code := outcome(config):
        raise SystemExit(code)


def outcome(config: Config) -> int:
    """As `main`; returns the exit code."""
    training = read_config(Training, config.config, config.overrides)
    told: Any = training
    sources = told.data if isinstance(told.data, tuple) else [told.data]

    def base() -> tuple[OpenedModel, str, Buckets]:
        model = training.model.open(torch.device("cpu"), training.run.cache)
        return model, address(**base_contents(model)), chosen_buckets(model, training.pictures)

    found = audit(
        base,
        sources,
        [source for o in training.observers if isinstance(o, Validation) for source in o.data],
        training.pictures,
        training.captions,
        Cache(training.run.cache or default_folder()),
        share=held_out_share(training),
        unmasked_weight=training.objective.unmasked_weight,
        trigger=getattr(told, "trigger", None),
        samples=config.samples,
        seed=training.run.seed,
        progress=shown,
    )
    folder = config.report or training.run.output / "check"
    found.write(folder, f"Audit of {config.config.name}")
    return _say(found, folder)


def _say(found: Report, folder: Path) -> int:
    for key, value in found.facts.items():
        print(f"{key}: {value}")
    for (width, height), count in sorted(found.buckets.items()):
        print(f"  {width:>5} x {height:<5} {count}")
    printed: Counter[str] = Counter()
    for finding in sorted(found.findings, key=lambda each: SEVERITIES.index(each.severity)):
        printed[finding.kind] += 1
        if printed[finding.kind] <= LISTED:
            print(f"{finding.severity}: {finding.kind}: {finding.message}")
    for kind, count in printed.items():
        if count > LISTED:
            print(f"{kind}: {count - LISTED} more")
    counts = Counter(finding.severity for finding in found.findings)
    said = ", ".join(f"{counts[name]} {name}{'s' * (counts[name] != 1)}" for name in SEVERITIES)
    print(f"{said}; made {folder}/report.html")
    return WRONG if counts["error"] else WARNED if counts["warning"] else 0


def command(argv: Sequence[str]) -> int:
    """Run `tuner check` with `argv`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="tuner check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, help="a training recipe's config file")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="values put over those of the file")
    parser.add_argument("--report", type=Path, help="the folder of report.html and report.json")
    parser.add_argument("--samples", type=int, default=8, help="how many showings are looked at closely")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    given = parser.parse_intermixed_args(argv)
    chosen = Config(
        config=given.config, overrides=tuple(given.overrides), report=given.report, samples=max(0, given.samples)
    )
    codes: list[int] = []
    return guarded(lambda: codes.append(outcome(chosen)), debug=given.debug) or codes[0]


if __name__ == "__main__":
    raise SystemExit(run(Config, main))
