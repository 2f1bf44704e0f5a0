"""What an adapter has learned, in the files that programs read: the ones of `release.write_lora`, and peft's own."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from tuner.errors import DataError
from tuner.methods._adapter import PeftFiles
from tuner.publish.provenance import Provenance
from tuner.publish.release import LoraFiles, write_lora
from tuner.publish.verify import LoraError, Networks, compare, modules_of
from tuner.weights.adapters.file import Adapters, read_adapters
from tuner.weights.layouts.modules import Modules
from tuner.weights.writer import atomic_write_text, save_safetensors, whole_folder

PEFT = "peft"
"""The folder of peft's folders, one a network, beside the files."""


def write_adapter(
    folder: Path,
    adapters: Adapters,
    in_peft: Mapping[str, PeftFiles],
    provenance: Provenance,
    *,
    networks: Networks,
) -> LoraFiles:
    """Write what was learned, for everybody: see `write_lora`; and into `peft/COMPONENT` what peft reads, where it can.

    A LoRA's values are float16, as usual. Other kinds' are float32: what is multiplied with others, or with a weight,
    would lose digits of what it does.

    Raises:
        DivergedError: a value is not finite.
        DataError: what was read back is not what was trained.
        ResourceError: the disk is full.
    """
    lora = adapters.as_lora()
    dtype = torch.float32 if lora is None else torch.float16
    modules = modules_of(networks)
    for component, files in in_peft.items():
        prefix = f"{component}."
        own = {name: change for name, change in adapters.changes.items() if name.startswith(prefix)}
        _write_peft(folder / PEFT / component, files, Adapters(own), modules)
    return write_lora(folder, adapters if lora is None else lora, provenance, networks=networks, dtype=dtype)


def _write_peft(folder: Path, files: PeftFiles, adapters: Adapters, modules: Modules) -> None:
    names = [name for name in modules.names if any(key.startswith(f"{name}.") for key in adapters.changes)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as aside:
        save_safetensors(aside / "adapter_model.safetensors", dict(files.tensors), {"format": "pt"})
        atomic_write_text(aside / "adapter_config.json", json.dumps(files.config, indent=2, sort_keys=True) + "\n")
        try:
            compare(read_adapters(aside, Modules(names, tensors=modules.tensors)), adapters)
        except LoraError as error:
            raise DataError(f"{folder}: {error}; not written, please report it") from error
