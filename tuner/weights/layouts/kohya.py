"""kohya's names, which A1111, Forge and ComfyUI read: `lora_unet_down_blocks_0_….lora_down.weight`, with alphas.

For Stable Diffusion 1, where the names are diffusers' own with `_` for `.`. So several modules could be called alike,
and a name alone does not say which module it is: `restore` is told the modules that there are.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.lora import A, B, LoraWeights

PREFIXES = {"unet.": "lora_unet_", "text_encoder.": "lora_te_"}
DOWN = ".lora_down.weight"
UP = ".lora_up.weight"
ALPHA = ".alpha"


def rename(lora: LoraWeights) -> dict[str, Tensor]:
    """The file's tensors: `lora`'s own, and one float32 number per module for its alpha.

    Raises:
        DataError: a module that cannot be said in these names, or two of one name.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in _names(lora.modules).items():
        tensors[name + DOWN] = lora.tensors[module + A]
        tensors[name + UP] = lora.tensors[module + B]
        tensors[name + ALPHA] = torch.tensor(lora.alphas[module], dtype=torch.float32)
    return tensors


def restore(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> LoraWeights:
    """The inverse of `rename`.

    Args:
        tensors: what is in the file.
        modules: canonical names of the modules that the network has, changed or not.

    Raises:
        DataError: a tensor that belongs to none of `modules`, or a module without one of its three.
    """
    names = _names(modules)
    found: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        module = names.get(name)
        match "." + rest:
            case suffix if module is None or suffix not in (DOWN, UP, ALPHA):
                raise DataError(f"{key!r}: belongs to no module of this network, or is no part of a LoRA")
            case suffix if suffix == ALPHA:
                alphas[module] = float(tensor)
            case suffix:
                found[module + (A if suffix == DOWN else B)] = tensor
    return LoraWeights(found, alphas)


def _names(modules: Iterable[str]) -> dict[str, str]:
    """The modules by the names that kohya gives them."""
    names: dict[str, str] = {}
    for module in modules:
        for component, prefix in PREFIXES.items():
            if module.startswith(component):
                name = prefix + module.removeprefix(component).replace(".", "_")
                break
        else:
            raise DataError(f"{module!r}: kohya's names have no word for it, only for {', '.join(PREFIXES)}")
        if names.setdefault(name, module) != module:
            raise DataError(f"{module!r} and {names[name]!r} are both {name!r} in kohya's names")
    return names
