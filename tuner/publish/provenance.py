"""Where a release comes from: what a run says about itself to everybody, in `release.json`, headers and the card."""

import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from tuner import plugins
from tuner.errors import ConfigError, DataError
from tuner.weights.modelspec import ModelSpec
from tuner.weights.writer import atomic_write_text

LOCAL = "unknown/local"
"""What is said of a base model that has no public name."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A sample of the finished model."""

    file: str
    """Relative to the run's output folder."""
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a release came about. All of it is made public, so it holds no path, no caption and no file name."""

    name: str
    """How the files are called, without ending: letters, digits, `_`, `-`, `.`."""
    base: str
    """`public_base(...)` of the base model."""
    architecture: str = "stable-diffusion-v1"
    prediction: Literal["epsilon", "v", "flow"]
    resolution: int
    """Side of the training pictures in pixels; the square root of their area where they are not square."""
    method: str
    """`lora` or another adapter's kind, `textual_inversion` where words alone were learned, or `full`."""
    images: int
    samples: int
    updates: int
    seed: int
    title: str | None = None
    """The name when None."""
    learning_rate: float | None = None
    optimizer: str | None = None
    guidance: float | None = None
    """That the network was told while it learned, where it is told one."""
    trigger: str | None = None
    tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    """The new words, and the file of each in `embeddings/`."""
    license: str | None = None
    date: str | None = None
    """ISO 8601."""
    description: str | None = None
    author: str | None = None
    tags: tuple[str, ...] = ()
    usage_hint: str | None = None
    negative: bool = False
    """Of new words: whether they belong into negative prompts."""
    zero_terminal_snr: bool = False
    """Whether the last time of the schedule is nothing but noise."""
    own_schedule: bool = False
    """Whether what is predicted, or the schedule, is not the base's any more."""
    pipeline: str = "DiffusionPipeline"
    """The stock pipeline that makes pictures of it."""
    guide: Literal["mask", "depth", "picture"] | None = None
    """What it is told of a picture besides the prompt."""
    settings: Mapping[str, bool | int | float | str] = field(default_factory=dict[str, bool | int | float | str])
    """`public_settings(...)` of the resolved config."""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    pictures: tuple[Picture, ...] = ()
    grid: str | None = None
    """A picture of all samples, relative to the run's output folder."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]{0,99}", self.name, re.ASCII):
            raise ConfigError(f"name: {self.name!r} cannot name a file; use letters, digits, '_', '-' and '.'")
        for token, file in self.tokens.items():
            if not re.fullmatch(r"[\w<>*+#@$-]+", token, re.ASCII) or not re.fullmatch(r"[\w.-]+", file, re.ASCII):
                raise ConfigError(f"tokens: {token!r} in {file!r} cannot be a word in a file; finish the run again")

    def spec(self) -> ModelSpec:
        """What of it goes into the header of a file."""
        return ModelSpec(
            name=self.name,
            title=self.title or self.name,
            architecture=self.architecture,
            prediction=self.prediction,
            resolution=self.resolution,
            base=self.base,
            images=self.images,
            samples=self.samples,
            updates=self.updates,
            seed=self.seed,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            guidance=self.guidance,
            trigger=self.trigger,
            license=self.license,
            date=self.date,
            version=f"tuner {self.versions.get('tuner', '')}".strip(),
            description=self.description,
            author=self.author,
            tags=self.tags,
            usage_hint=self.usage_hint,
            negative=self.negative,
            zero_terminal_snr=self.zero_terminal_snr,
            settings=self.settings,
        )


def write_provenance(run: Path, provenance: Provenance) -> Path:
    """Write `release.json` into the output folder `run`."""
    path = run / "release.json"
    atomic_write_text(path, json.dumps(plugins.write(provenance), indent=2, ensure_ascii=False) + "\n")
    return path


def read_provenance(run: Path) -> Provenance:
    """The `release.json` of the output folder `run`.

    Raises:
        DataError: there is none, or it is not one.
    """
    path = run / "release.json"
    try:
        table: object = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the output folder of a finished run") from None
    except ValueError as error:
        raise DataError(f"{path}: no valid JSON: {error}; finish the run again") from error
    if not isinstance(table, dict):
        raise DataError(f"{path}: expected a table; finish the run again")
    try:
        return plugins.read(Provenance, cast(dict[str, Any], table))
    except ValueError as error:  # pydantic's is one, and says every field on lines of their own
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path}: not what a run writes: {reason}; finish the run again") from error


def public_base(source: str | Path) -> str:
    """`source` if it is the name of a model on the Hub or of one that comes with this program, else `unknown/local`."""
    text = str(source)
    known = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text, re.ASCII) and not Path(text).expanduser().exists()
    return text if known else LOCAL


def public_settings(table: Mapping[str, Any], *, prefix: str = "") -> dict[str, bool | int | float | str]:
    """What of a resolved config anybody may see, flat: numbers, switches, and the names of chosen parts.

    Texts are left out, as they are paths, captions and names of persons; so is what lies in a list, and what has a name
    that the user chose.
    """
    settings: dict[str, bool | int | float | str] = {}
    for key, value in table.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", key):
            continue
        if isinstance(value, Mapping):
            settings |= public_settings(cast(Mapping[str, Any], value), prefix=f"{prefix}{key}.")
        elif isinstance(value, bool | int | float) or (
            key in ("type", "precision", "dtype") and isinstance(value, str) and re.fullmatch(r"[a-z0-9_]{1,40}", value)
        ):
            settings[prefix + key] = value
    return settings


def versions() -> dict[str, str]:
    """Versions of this program and of the libraries that matter to a result."""
    packages = {"tuner": "diffusion-tuner", **{name: name for name in ("torch", "diffusers", "transformers", "peft")}}
    found: dict[str, str] = {}
    for name, package in packages.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
