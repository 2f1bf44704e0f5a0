"""What peft says about an adapter beside its tensors: in `adapter_config.json`, or in a diffusers file's header."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tuner.errors import DataError
from tuner.weights.layouts.modules import PEFT

METADATA = "lora_adapter_metadata"
"""The header's key: the configs of all components as one table of `component.key`."""
FILE = "adapter_config.json"
ADAPTERS = "adapter_model.safetensors"
"""What peft calls the file that its config is about."""
PICKLED = "adapter_model.bin"
MAX_BYTES = 10_000_000
OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How `init_lora_weights` begins where the base was changed before the training began."""
OTHER_LAYERS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
"""Settings of peft's with which two factors are more, or something else, than a product that is added to a weight."""


def adapters_file(path: Path) -> Path:
    """The file that holds the adapters at `path`: itself, or, of a folder of peft's, the one in it."""
    return path / ADAPTERS if is_peft_folder(path) else path


def is_peft_folder(path: Path) -> bool:
    """Whether peft has saved adapters in the folder `path`."""
    if not path.is_dir() or (path / "model_index.json").is_file():
        return False
    return any((path / name).is_file() for name in (ADAPTERS, FILE))


@dataclass(frozen=True)
class PeftConfig:
    """The settings by component; of all modules under an empty name."""

    place: str
    """For messages."""
    components: Mapping[str, Mapping[str, object]]

    @staticmethod
    def find(path: Path, metadata: Mapping[str, str], names: Iterable[str]) -> "PeftConfig | None":
        """That of the file at `path`, whose header says `metadata`; None when there is none.

        A config that lies beside is of a file with peft's own `names` of tensors, or with peft's name: others, such as
        diffusers', are what they are wherever they are put.

        Raises:
            DataError: it is there and cannot be read, or says that the file is not what it looks like.
        """
        if METADATA in metadata:
            table = _table(metadata[METADATA], f"{path}: {METADATA}")
            components: dict[str, dict[str, object]] = {}
            for key, value in table.items():
                component, _, name = key.partition(".")
                components.setdefault(component, {})[name] = value
            return PeftConfig(f"{path}: {METADATA}", components).checked()
        file = path.with_name(FILE)
        if file == path or not file.is_file():
            return None
        if path.name != ADAPTERS and not any(name.startswith(PEFT) for name in names):
            return None
        try:
            if file.stat().st_size > MAX_BYTES:
                raise DataError(f"{file}: larger than {MAX_BYTES} bytes; do not use it")
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read; download it again") from error
        return PeftConfig(str(file), {"": _table(text, str(file))}).checked()

    def checked(self) -> "PeftConfig":
        """The same.

        Raises:
            DataError: the tensors mean something else than those of the same names usually do.
        """
        for component, settings in self.components.items():
            place = f"{self.place}: {component}." if component else f"{self.place}: "
            begun = settings.get("init_lora_weights")
            if isinstance(begun, str) and begun.lower().startswith(OTHER_BASES):
                raise DataError(
                    f"{place}init_lora_weights: {begun!r}: it is for a base that was changed before training; save it "
                    "again with peft's path_initial_model_for_weight_conversion"
                )
            if other := next((name for name in OTHER_LAYERS if settings.get(name)), None):
                raise DataError(
                    f"{place}{other}: such a LoRA is more than a product that is added to a weight, and is not read; "
                    "merge it with peft, and use the model that this gives"
                )
        return self

    def of(self, spelling: str) -> Mapping[str, object] | None:
        """The settings of one module, with its own `r` and `alpha`; None when its component has none.

        Raises:
            DataError: the config says no usable alpha.
        """
        spelling = spelling.removeprefix(PEFT)
        component, _, path = spelling.partition(".")
        settings, module = self.components.get(component), path
        if settings is None:
            settings, module = self.components.get(""), spelling
        if settings is None:
            return None
        alpha = self._own(settings, "alpha", module, settings.get("lora_alpha", settings.get("alpha")))
        rank = self._own(settings, "rank", module, settings.get("r"))
        return {**settings, "alpha": alpha, "r": rank}

    def _own(self, settings: Mapping[str, object], what: str, module: str, default: object) -> object:
        """The number of `module` where a pattern names it, else the default. peft's patterns are ends of names."""
        patterns = settings.get(f"{what}_pattern")
        for pattern, number in (cast("dict[str, object]", patterns) if isinstance(patterns, dict) else {}).items():
            ending = pattern.removeprefix("^").removesuffix("$")
            if any(character in ending for character in "*+?[](){}|\\^$"):
                raise DataError(
                    f"{self.place}: {what}_pattern: {pattern!r}: only plain names of modules are understood"
                )
            if module == ending or (not pattern.startswith("^") and module.endswith(f".{ending}")):
                default = number
                break
        if default is not None and (isinstance(default, bool) or not isinstance(default, (int, float))):
            raise DataError(f"{self.place}: {what}: expected a number, got {default!r}")
        return default


def _table(text: str, place: str) -> dict[str, object]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: is no valid JSON; download it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{place}: is no JSON object; download it again")
    return cast("dict[str, object]", content)
