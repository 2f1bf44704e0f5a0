"""Linear layers kept in 4 or 8 bits, on bitsandbytes' layers (Dettmers et al. 2022, arXiv:2208.07339, and 2023,
arXiv:2305.14314).
"""

import re
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn

from tuner.errors import ConfigError
from tuner.weights.store import TensorStore

Quantization = Literal["nf4", "int8"]


def quantize(
    network: nn.Module, pattern: str, kind: Quantization, device: torch.device, source: TensorStore | None = None
) -> None:
    """Put quantized layers in place of the linear ones that `pattern` is found in, one by one, on `device`.

    Each has `exact`, which reads its weight from `source`, the files of the network, as it was.

    Raises:
        ConfigError: bitsandbytes is not there.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError("model.quantize: needs bitsandbytes, which is not installed; leave it out") from error
    library: Any = bitsandbytes
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        if re.search(pattern, name):
            shape = (layer.in_features, layer.out_features, layer.bias is not None)
            if kind == "nf4":
                other = library.nn.Linear4bit(*shape, compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta")
                other.support_avx512bf16_for_cpu = False  # else it repacks itself, rounding, when nothing learns
                other.weight = library.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            else:
                other = library.nn.Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
                other.weight = library.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            other.bias = layer.bias
            if source is not None:
                other.exact = partial(source.read, f"{name}.weight")
            network.set_submodule(name, cast(nn.Module, other.to(device).train(layer.training)))
