"""(IA)³: inputs or outputs of layers times learned factors (Liu et al. 2022, arXiv:2205.05638), on peft's layers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import peft
from torch import nn

from tuner.methods._adapter import PeftFiles, Size, SizelessAdapter, still
from tuner.methods._peft import ADAPTER, files
from tuner.methods.base import Method
from tuner.weights.adapters.rescaling import Rescaling


@dataclass(frozen=True, kw_only=True)
class IA3(SizelessAdapter):
    """Learn a factor for each output of a layer without a bias (keys, values), and for each input of one with a bias.

    A factor of an output would be one of the bias too, which files of other programs cannot say. It has very few
    numbers, so it wants a high learning rate, such as 1e-2.
    """

    kind: ClassVar[str] = "ia3"

    def insert(self, network: nn.Module, sizes: Mapping[str, Size]) -> None:
        inputs = [name for name in sizes if getattr(network.get_submodule(name), "bias", None) is not None]
        config = peft.IA3Config(
            target_modules="|".join(re.escape(name) for name in sizes),
            feedforward_modules="|".join(re.escape(name) for name in inputs),
        )
        peft.inject_adapter_in_model(config, network)
        found = {name for name, module in network.named_modules() if hasattr(module, "ia3_l")}
        assert found == sizes.keys(), sorted(found ^ sizes.keys())[:3]

    def in_peft(self, layers: Mapping[str, Any]) -> PeftFiles:
        inputs = [name for name, layer in layers.items() if layer.is_feedforward]
        return files(layers, peft.IA3Config, feedforward_modules=inputs)

    def change(self, layer: Any) -> Rescaling:
        factors = still(layer.ia3_l[ADAPTER])
        added = factors - 1 if factors.ndim == 4 else factors.flatten() - 1
        return Rescaling(added, of_inputs=layer.is_feedforward, offset=1.0)


SPEC: type[Method] = IA3
