"""peft's layers put into a network, and its files: the one place where peft's ways are known."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import peft
from torch import nn

from tuner.methods._adapter import PeftFiles, Size, adapted, still
from tuner.weights.layouts.modules import PEFT

ADAPTER = "default"
"""What peft calls the one adapter of a layer."""


def inject(
    network: nn.Module,
    sizes: Mapping[str, Size],
    make: Callable[..., peft.PeftConfig],
    parameter: str,
) -> None:
    """Put peft's layers into `network` in place of those that `sizes` names; all else of it stops learning.

    Args:
        network: what is adapted.
        sizes: rank and alpha of each layer, by its whole name.
        make: a config of one kind of peft's, given its layers, ranks and alphas.
        parameter: what each adapted layer has of its own, to see that the right ones were adapted.
    """
    alike: dict[Size, list[str]] = {}
    for name, size in sizes.items():
        alike.setdefault(size, []).append(re.escape(name))
    patterns = {f"^(?:{'|'.join(names)})": size for size, names in alike.items()}
    config = make(
        target_modules="|".join(re.escape(name) for name in sizes),
        rank_pattern={pattern: size.rank for pattern, size in patterns.items()},
        alpha_pattern={pattern: size.alpha for pattern, size in patterns.items()},
    )
    peft.inject_adapter_in_model(config, network)
    found = {name for name, module in network.named_modules() if hasattr(module, parameter)}
    assert found == sizes.keys(), sorted(found ^ sizes.keys())[:3]


def files(layers: Mapping[str, Any], make: Callable[..., peft.PeftConfig], **more: Any) -> PeftFiles:
    """What `peft.PeftModel.from_pretrained` reads, of adapted layers of one network by their own names."""
    tensors = {f"{PEFT}{name}.{own}": still(p) for name, layer in layers.items() for own, p in adapted(layer)}
    table = make(target_modules=list(layers), inference_mode=True, **more).to_dict()
    return PeftFiles(json.loads(json.dumps(table, default=list)), tensors)


def ranked_files(layers: Mapping[str, Any], make: Callable[..., peft.PeftConfig]) -> PeftFiles:
    """As `files`, of layers that have ranks and alphas."""
    ranks = {name: layer.r[ADAPTER] for name, layer in layers.items()}
    alphas = {name: layer.alpha[ADAPTER] for name, layer in layers.items()}
    (rank, _), (alpha, _) = (Counter(values).most_common(1)[0] for values in (ranks.values(), alphas.values()))
    return files(
        layers,
        make,
        r=rank,
        alpha=alpha,
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
    )


def check_scale(layer: Any, size: Size, scale: float) -> None:
    """See that peft has understood: an adapted layer's rank, and what it multiplies with."""
    assert (layer.r[ADAPTER], layer.scaling[ADAPTER]) == (size.rank, scale), layer


def never_left_out(layer: Any) -> None:
    """Make an adapted layer's output independent of chance.

    In training peft leaves LoHa and LoKr out of a forward unless a random number in [0, 1) is greater than
    `module_dropout`. For its default, 0, that happens once in 2²⁴ forwards, so a run could not be repeated.
    """
    layer.module_dropout[ADAPTER] = -1.0
