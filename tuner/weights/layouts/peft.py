"""diffusers' names: the canonical ones, `unet.….lora_A.weight`, with alpha folded into B.

A file that says no alpha is loaded with alpha = rank, so B carries the factor. Older readers take one rank for all
modules of a component when no alphas are said, so lower ranks are filled up with zeros. Text encoder names always have
`text_model.`: every reader knows them.
"""

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.lora import A, B, LoraWeights

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
T5 = ("encoder.block.", "encoder.final_layer_norm", "shared")
"""How the names of T5's modules start, which is Stable Diffusion 3's third encoder and Flux' second."""


def rename(lora: LoraWeights) -> dict[str, Tensor]:
    """The file's tensors, which give the same deltas as `lora`.

    Raises:
        DataError: a module of a component that diffusers does not look for.
    """
    ranks: dict[str, int] = {}
    for module in lora.modules:
        component = _component(module)
        ranks[component] = max(ranks.get(component, 0), lora.rank(module))
    tensors: dict[str, Tensor] = {}
    for module in lora.modules:
        down, up = lora.tensors[module + A], lora.tensors[module + B]
        missing = ranks[_component(module)] - lora.rank(module)
        up = lora.alphas[module] / lora.rank(module) * up
        tensors[module + A] = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
        tensors[module + B] = torch.cat([up, up.new_zeros(up.shape[0], missing, *up.shape[2:])], dim=1)
    return tensors


def knows(module: str) -> bool:
    """Whether diffusers reads LoRAs of `module`."""
    component, _, path = module.partition(".")
    return component in COMPONENTS and not (component.startswith("text_encoder") and path.startswith(T5))


def _component(module: str) -> str:
    component, _, path = module.partition(".")
    if component.startswith("text_encoder") and path.startswith(T5):
        raise DataError(f"{module!r}: diffusers reads no LoRA of a T5; leave it out, or choose kohya's names")
    flat = component == "text_encoder" and not path.startswith(("text_model.", "text_projection"))
    if component not in COMPONENTS or flat:
        raise DataError(f"{module!r}: not in diffusers' names, only modules of {' and '.join(COMPONENTS)} are")
    return component
