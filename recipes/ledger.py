"""Says which picture a run has shown how often, from its config and its samples alone.

tuner ledger runs/my-lora
tuner ledger runs/my-lora --csv seen.csv
tuner ledger my-lora.toml --samples 12000

The order of pictures is a function of the config, so nothing is logged, and a run may have been stopped and gone on
with any number of processes. Of a run's folder, it counts up to the newest checkpoint; of a config, up to `--samples`,
or else to the end. Where the data are not those of the checkpoint any more, it says so and counts nothing.
"""

import argparse
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tuner.cli import read_config
from tuner.config.command_line import guarded, run
from tuner.config.writer import to_toml
from tuner.data.broken import find_broken
from tuner.data.buckets import Buckets, in_each_area
from tuner.data.cache import Cache, default_folder
from tuner.data.encode import Encoded
from tuner.data.ledger import Ledger, Line, times_seen
from tuner.data.order import Order
from tuner.data.sources.base import without
from tuner.data.split import hold_out
from tuner.data.stream import expand
from tuner.errors import ConfigError, DataError
from tuner.training.checkpoint import Checkpoint, Checkpoints
from tuner.training.recipe import Training, held_out_share, refuse_empty
from tuner.training.run import chosen_buckets
from tuner.training.watchers import shown

DECIDES = ("the pictures", "the pictures' repeats")
"""Of what checkpoints keep of the data, that which the counts go by."""
ALSO_DECIDES = (
    *("run.seed", "run.batch_size"),
    *(f"pictures.{name}" for name in ("resolution", "bucket_step", "max_ratio", "areas")),
)
"""The same of the config."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of what, and how it is told."""

    place: Path
    """A run's folder, or a training recipe's config file."""
    overrides: tuple[str, ...] = ()
    """Values put over those of the config, as on a recipe's command line: `path=value`."""
    samples: int | None = None
    """After how many samples; where left out, as many as the newest checkpoint has seen."""
    json: bool = False
    """Print JSON instead of a table."""
    csv: Path | None = None
    """A file to write with a line for every picture."""
    ends: int = 5
    """How many of the pictures seen least and most are named."""
    anyway: bool = False
    """Count by the data as they are now, though they were others at the checkpoint."""

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 0:
            raise ValueError(f"samples must not be negative, got {self.samples}")
        if self.ends < 0:
            raise ValueError(f"ends must not be negative, got {self.ends}")


def main(config: Config) -> None:
    """Count, and tell.

    Raises:
        DataError: the data are not those of the checkpoint any more.
    """
    file = config.place / "config.toml" if config.place.is_dir() else config.place
    training = read_config(Training, file, config.overrides)
    output = config.place if config.place.is_dir() else training.run.output
    checkpoint, _ = Checkpoints(folder=output / "checkpoints").newest()
    if checkpoint is None and config.place.is_dir() and config.samples is None:
        raise DataError(f"{config.place}: has no whole checkpoint yet; say after how many samples with --samples")
    facts = {} if checkpoint is None else checkpoint.facts()
    encoded = _data(training, _buckets(training, facts))
    notes = [] if checkpoint is None else _changes(training, encoded, checkpoint, config.anyway)
    if training.run.accept_changes:
        notes.append("run.accept_changes is set: if the data were others at first, the counts are not what was shown")
    samples = expand([example.repeats for example in encoded.examples])
    order = Order(
        buckets=tuple(encoded.sizes[i] for i in samples), seed=training.run.seed, batch_size=training.run.batch_size
    )
    planned = -(-training.run.total_samples(len(samples)) // order.batch_size) * order.batch_size
    at = config.samples if config.samples is not None else int(facts.get("samples_seen", planned))
    ledger = Ledger(encoded.examples, samples, times_seen(order, at))
    if config.csv is not None:
        ledger.write_csv(config.csv)
    (_print_json if config.json else _print)(config, ledger, at, planned, len(samples), notes)


def _buckets(training: Training, facts: Mapping[str, Any]) -> Buckets:
    """Those of the checkpoint; where there is none, the base has to be asked."""
    if not facts.get("areas"):
        model = training.model.open(torch.device("cpu"), training.run.cache)
        return chosen_buckets(model, training.pictures)
    found: Buckets | None = None
    for resolution, step in sorted(facts["areas"]):
        found = Buckets(resolution=resolution, step=step, max_ratio=training.pictures.max_ratio, smaller=found)
    assert found is not None
    return found


def _data(training: Training, buckets: Buckets) -> Encoded:
    """What a run is trained on, in its order; nothing is encoded here."""
    cache = Cache(training.run.cache or default_folder())
    told: Any = training
    sources = told.data if isinstance(told.data, tuple) else [told.data]
    refuse_empty(sources)
    size = (buckets.resolution, buckets.resolution)
    broken = find_broken(sources, training.pictures, cache, shown)
    examples, _ = without(sources, broken, captioned=False, unmade=size)  # captions move no count
    examples, _ = hold_out(examples, held_out_share(training), training.pictures.background, cache, shown)
    return Encoded(
        examples=in_each_area(examples, buckets) if training.pictures.areas == "each" else examples,
        buckets=buckets,
        pictures=training.pictures,
        cache=cache,
        autoencoder="",
        text_encoder=None,
    )


def _changes(training: Training, encoded: Encoded, checkpoint: Checkpoint, anyway: bool) -> list[str]:
    """What is not as it was at the checkpoint, a line each.

    Raises:
        DataError: that which the counts go by, unless `anyway`.
    """
    facts, config = checkpoint.facts(), tomllib.loads(to_toml(training))
    was = facts.get("identity", {})
    now = {what: content for what, content in encoded.contents().items() if what != "the captions"}  # they are not read
    changed = [what for what, content in now.items() if was.get(what) != content]
    changed += [path for path in ALSO_DECIDES if _at(facts["config"], path) != _at(config, path)]
    deciding = [what for what in changed if what in (*DECIDES, *ALSO_DECIDES)]
    if deciding and not anyway:
        raise DataError(
            f"{', '.join(deciding)}: changed since {checkpoint.folder}, so what was shown how often cannot be told; "
            "put them back, or count as if they had always been so with --anyway"
        )
    means = {True: "the counts are of what is there now", False: "which moves no count"}
    return [f"{what}: changed since {checkpoint.folder}, {means[what in deciding]}" for what in changed]


def _at(config: Mapping[str, Any], path: str) -> Any:
    section, name = path.split(".")
    return config.get(section, {}).get(name)


def _print_json(config: Config, ledger: Ledger, at: int, planned: int, an_epoch: int, notes: Sequence[str]) -> None:
    told = {
        "samples_seen": at,
        "planned": planned,
        "an_epoch": an_epoch,
        "epochs": at / an_epoch,
        "sources": [asdict(source) for source in ledger.sources()],
        "least": [asdict(line) for line in ledger.least(config.ends)],
        "most": [asdict(line) for line in ledger.most(config.ends)],
        "notes": list(notes),
    }
    print(json.dumps(told, ensure_ascii=False, indent=1))


def _print(config: Config, ledger: Ledger, at: int, planned: int, an_epoch: int, notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}")
    print(f"{at:,} of {planned:,} samples seen, {at / an_epoch:.2f} epochs of {an_epoch:,} samples")
    print(f"{'source':<16}{'pictures':>10}{'an epoch':>12}{'seen':>18}{'showings':>14}")
    for of in ledger.sources():
        print(f"{of.source:<16}{of.pictures:>10,}{_range(of.an_epoch):>12}{_range(of.seen):>18}{of.showings:>14,}")
    for name, lines in (("least", ledger.least(config.ends)), ("most", ledger.most(config.ends))):
        if lines:
            print(f"seen {name}:")
        for line in lines:
            print(f"  {line.seen:>8,}  {line.name} ({line.source}, {_times(line)})")
    if config.csv is not None:
        print(f"made {config.csv}")


def _range(ends: tuple[int, int]) -> str:
    return f"{ends[0]:,}" if ends[0] == ends[1] else f"{ends[0]:,} to {ends[1]:,}"


def _times(line: Line) -> str:
    return "once an epoch" if line.an_epoch == 1 else f"{line.an_epoch} times an epoch"


def command(argv: Sequence[str]) -> int:
    """Run `tuner ledger` with `argv`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="tuner ledger",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("place", type=Path, help="a run's folder, or a training recipe's config file")
    parser.add_argument("overrides", nargs="*", metavar="path=value", help="values put over those of the config")
    parser.add_argument("--samples", type=int, help="after how many samples; at the newest checkpoint when left out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--csv", type=Path, help="a file to write with a line for every picture")
    parser.add_argument("--ends", type=int, default=5, help="how many of those seen least and most are named")
    parser.add_argument("--anyway", action="store_true", help="count by the data as they are, though they have changed")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    given = vars(parser.parse_intermixed_args(argv))
    debug = given.pop("debug")

    def body() -> None:
        try:
            config = Config(**{**given, "overrides": tuple(given["overrides"])})
        except ValueError as error:
            raise ConfigError(f"--{error}") from None
        main(config)

    return guarded(body, debug=debug)


if __name__ == "__main__":
    raise SystemExit(run(Config, main))
