"""Weights in 8 bits with a scale beside them, as ComfyUI reads them: w ≈ scale · q, scale = max |w| / 448.

8-bit floats have three binary places and reach from 2^-9 to 448; below 2^-6 they have fewer. Weights that lie around
0.02 use that lower end of the range; divided by their scale they use all of it.

`X.scale_weight`, one float32, stands beside `X.weight`, and a tensor `scaled_fp8` of two numbers marks the file: with
two, and not none, the layers compute in 16 bits, as nothing is known of the sizes of their inputs. ComfyUI knows scales
of linear layers alone, and so only those of the denoiser are scaled; everything else keeps its dtype.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.methods.base import Fitted, Merge, Space, Tensors
from tuner.errors import ConfigError, DataError
from tuner.weights.architecture import identify
from tuner.weights.fp8 import MARKER
from tuner.weights.store import TensorMeta

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
WEIGHT, SCALE = ".weight", ".scale_weight"
MARK = TensorMeta((2,), DTYPE)


@dataclass(frozen=True, kw_only=True)
class Scaling(Fitted):
    """x / scale, the last step for a weight that is scaled."""

    takes = (Space.EITHER,)
    gives = Space.EITHER
    temporaries = 1

    def fit(self, tensors: Tensors) -> Merge:
        """Find the scale: a pass over the tensor as it was merged."""
        largest = max((inputs[0].abs().max().item() for _, inputs in tensors.chunks()), default=0.0)
        scale = torch.tensor(largest / LARGEST, dtype=torch.float32).item()
        if not math.isfinite(scale):
            raise DataError(
                f"{tensors.name}: holds NaN or infinity, and nothing can be scaled to them; choose bfloat16"
            )
        return Divided(scale or 1.0)


@dataclass(frozen=True)
class Divided:
    """x / scale, within what the dtype holds."""

    scale: float

    def __call__(self, inputs: Sequence[Tensor], out: Tensor, start: int) -> None:
        torch.div(inputs[0], self.scale, out=out)
        out.clamp_(-LARGEST, LARGEST)


@dataclass(frozen=True)
class Scaled:
    """Which tensors of an output are scaled."""

    weights: frozenset[str]
    mark: str
    """The name of the tensor that says so."""

    @staticmethod
    def of(metas: Mapping[str, TensorMeta]) -> "Scaled":
        """The linear layers of the denoiser.

        Raises:
            ConfigError: the names are not those of a single file, so that ComfyUI would not read the scales.
        """
        known = identify(metas)
        if known.family is None or known.layout != "ldm":
            raise ConfigError(
                "dtype: 'float8_e4m3fn_scaled' is for single files with the original names; convert the models with "
                "'tuner convert --layout ldm', or choose another dtype"
            )
        weights = {
            name
            for name, meta in metas.items()
            if known.component(name) in ("unet", "transformer")
            and name.endswith(WEIGHT)
            and len(meta.shape) == 2
            and meta.dtype.is_floating_point
        }
        return Scaled(frozenset(weights), known.prefix + MARKER)
