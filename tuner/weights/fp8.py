"""Weights kept in 8-bit floating point with a scale beside them: w = scale · q.

Two conventions, both ComfyUI's (its QUANTIZATION.md, and the files that are in use). The older has `X.scale_weight`
beside `X.weight`, and an empty tensor `scaled_fp8` that marks the file. The newer has `X.weight_scale`, and which kind
it is in `X.comfy_quant` or in the header's metadata. Scales of a layer's inputs (`X.scale_input`, `X.input_scale`)
belong to a way of computing, not to the weights, and are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tuner.errors import DataError
from tuner.weights.store import Location, TensorMeta, TensorStore, quote

FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}
SCALES = (".scale_weight", ".weight_scale")
"""What stands for `.weight` in the name of a weight's scale."""
LEFT_OUT = (".scale_input", ".input_scale", ".comfy_quant")
MARKER = "scaled_fp8"
QUANTIZATION = "_quantization_metadata"
"""The header's text about it."""
OTHER_KINDS = (".weight_scale_2", ".pre_quant_scale")
"""Of formats with two scales, which are not read here."""


def has_scales(store: TensorStore) -> bool:
    """Whether some weights of `store` mean something else than their numbers say."""
    return any(name.endswith((*SCALES, ".comfy_quant")) for name in store.metas)


@dataclass(frozen=True)
class Scaled:
    """The store with every scaled weight in float32, as what it means; everything else as it is."""

    store: TensorStore

    @cached_property
    def _scales(self) -> Mapping[str, str]:
        """The name of each scaled weight's scale.

        Raises:
            DataError: a scale without its weight, of another shape, or of another kind of quantization.
        """
        metas = self.store.metas
        scales: dict[str, str] = {}
        for name, meta in metas.items():
            suffix = next((suffix for suffix in SCALES if name.endswith(suffix)), None)
            if suffix is None:
                if name.endswith(OTHER_KINDS):
                    raise DataError(f"{quote(name)}: a quantization that is not read; use the model in 16 bits")
                continue
            weight = f"{name.removesuffix(suffix)}.weight"
            if weight not in metas or weight in scales:
                fault = "scales a weight that has another scale" if weight in scales else "scales no weight"
                raise DataError(f"{quote(name)}: {fault}; the file is damaged, download it again")
            if metas[weight].dtype not in FP8:
                raise DataError(f"{quote(weight)}: quantized to other than 8-bit floats; use the model in 16 bits")
            rows = metas[weight].shape[:1]
            if torch.Size(meta.shape).numel() != 1 and meta.shape not in (rows, (*rows, 1)):
                raise DataError(
                    f"{quote(name)}: of shape {list(meta.shape)}, expected one number, or one for each of "
                    f"{list(rows)} rows; use the model in 16 bits"
                )
            scales[weight] = name
        return scales

    @cached_property
    def _metas(self) -> Mapping[str, TensorMeta]:
        kept = {
            name: meta
            for name, meta in self.store.metas.items()
            if not name.endswith((*SCALES, *LEFT_OUT)) and name.rpartition(".")[2] != MARKER
        }
        return {**kept, **{name: TensorMeta(kept[name].shape, torch.float32) for name in self._scales}}

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        """Every tensor's name, shape and dtype; of scales and markers there are none."""
        return self._metas

    def read(self, name: str) -> Tensor:
        """The tensor `name`, freshly allocated on the CPU; scaled weights in float32."""
        if name not in self._metas:
            raise KeyError(name)
        values = self.store.read(name)
        if name not in self._scales:
            return values
        scale = self.store.read(self._scales[name]).float()
        return values.float() * scale.reshape(-1, *[1] * (values.ndim - 1))

    def locate(self, name: str) -> Location | None:
        """Where the values of `name` lie in a file; None for scaled weights, which are computed."""
        if name not in self._metas:
            raise KeyError(name)
        return None if name in self._scales else self.store.locate(name)
