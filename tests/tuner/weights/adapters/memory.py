"""Tensors in memory as a store, and one adapter of every kind."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.weights.store import TensorMeta


@dataclass(frozen=True)
class Memory:
    tensors: Mapping[str, Tensor]

    @property
    def metas(self) -> Mapping[str, TensorMeta]:
        return {name: TensorMeta(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].clone()

    def locate(self, name: str) -> None:
        if name not in self.tensors:
            raise KeyError(name)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape)))


NETWORK = {
    "unet.conv_in": (8, 4, 3, 3),
    "unet.time_embedding.linear_1": (12, 8),
    "unet.down_blocks.0.attentions.1.proj_in": (8, 8, 1, 1),
    "unet.down_blocks.0.attentions.1.norm": (8,),
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (8, 8),
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0": (8, 8),
    "unet.down_blocks.0.resnets.0.conv1": (16, 8, 3, 3),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (16, 8),
}
"""The weights of a few modules as Stable Diffusion 1 has them; all have biases but for `to_q`."""


def network(*, seed: int = 0) -> dict[str, Tensor]:
    tensors = {f"{name}.weight": drawn(*shape, seed=seed) for name, shape in NETWORK.items()}
    biases = {
        f"{name}.bias": drawn(shape[0], seed=seed) for name, shape in NETWORK.items() if not name.endswith("to_q")
    }
    return tensors | biases


LINEAR = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
CONV = "unet.down_blocks.0.resnets.0.conv1"
POINT = "unet.down_blocks.0.attentions.1.proj_in"
NORM = "unet.down_blocks.0.attentions.1.norm"

K_LINEAR = "lora_te_text_model_encoder_layers_0_mlp_fc1"
K_CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
K_POINT = "lora_unet_down_blocks_0_attentions_1_proj_in"
K_NORM = "lora_unet_down_blocks_0_attentions_1_norm"

R, F, N = 3, 1.5, torch.tensor


def _lora(name: str, out: int, *rest: int) -> dict[str, Tensor]:
    ones = (1,) * (len(rest) - 1)
    return {f"{name}.lora_up.weight": drawn(out, R, *ones), f"{name}.lora_down.weight": drawn(R, *rest, seed=1)}


FILES: dict[str, dict[str, Tensor]] = {
    "lora": {**_lora(K_LINEAR, 16, 8), f"{K_LINEAR}.alpha": N(F)},
    "lora without alpha": _lora(K_LINEAR, 16, 8),
    "locon": {**_lora(K_CONV, 16, 8, 3, 3), f"{K_CONV}.alpha": N(F)},
    "locon of one point": {**_lora(K_POINT, 8, 8, 1, 1), f"{K_POINT}.alpha": N(F)},
    "locon with a middle": {
        **_lora(K_CONV, 16, 8, 1, 1), f"{K_CONV}.lora_mid.weight": drawn(R, R, 3, 3), f"{K_CONV}.alpha": N(F)
    },
    "loha": {
        f"{K_LINEAR}.hada_w1_a": drawn(16, R), f"{K_LINEAR}.hada_w1_b": drawn(R, 8, seed=1),
        f"{K_LINEAR}.hada_w2_a": drawn(16, R, seed=2), f"{K_LINEAR}.hada_w2_b": drawn(R, 8, seed=3),
        f"{K_LINEAR}.alpha": N(F),
    },
    "loha of a convolution": {
        f"{K_CONV}.hada_w1_a": drawn(16, R), f"{K_CONV}.hada_w1_b": drawn(R, 72, seed=1),
        f"{K_CONV}.hada_w2_a": drawn(16, R, seed=2), f"{K_CONV}.hada_w2_b": drawn(R, 72, seed=3),
        f"{K_CONV}.alpha": N(F),
    },
    "loha with cores": {
        f"{K_CONV}.hada_w1_a": drawn(R, 16), f"{K_CONV}.hada_w1_b": drawn(R, 8, seed=1),
        f"{K_CONV}.hada_w2_a": drawn(R, 16, seed=2), f"{K_CONV}.hada_w2_b": drawn(R, 8, seed=3),
        f"{K_CONV}.hada_t1": drawn(R, R, 3, 3), f"{K_CONV}.hada_t2": drawn(R, R, 3, 3, seed=1), f"{K_CONV}.alpha": N(F),
    },
    "lokr": {
        f"{K_LINEAR}.lokr_w1": drawn(4, 2), f"{K_LINEAR}.lokr_w2_a": drawn(4, R), f"{K_LINEAR}.lokr_w2_b": drawn(R, 4),
        f"{K_LINEAR}.alpha": N(F),
    },
    "lokr of whole factors": {
        f"{K_LINEAR}.lokr_w1": drawn(4, 2), f"{K_LINEAR}.lokr_w2": drawn(4, 4), f"{K_LINEAR}.alpha": N(F)
    },
    "lokr of products": {
        f"{K_LINEAR}.lokr_w1_a": drawn(4, R), f"{K_LINEAR}.lokr_w1_b": drawn(R, 2),
        f"{K_LINEAR}.lokr_w2_a": drawn(4, R), f"{K_LINEAR}.lokr_w2_b": drawn(R, 4), f"{K_LINEAR}.alpha": N(F),
    },
    "lokr of a convolution": {
        f"{K_CONV}.lokr_w1": drawn(4, 2), f"{K_CONV}.lokr_w2": drawn(4, 4, 3, 3), f"{K_CONV}.alpha": N(F)
    },
    "lokr of a convolution, flat": {
        f"{K_CONV}.lokr_w1": drawn(4, 2), f"{K_CONV}.lokr_w2_a": drawn(4, R), f"{K_CONV}.lokr_w2_b": drawn(R, 36),
        f"{K_CONV}.alpha": N(F),
    },
    "lokr with a core": {
        f"{K_CONV}.lokr_w1": drawn(4, 2), f"{K_CONV}.lokr_t2": drawn(R, R, 3, 3), f"{K_CONV}.lokr_w2_a": drawn(R, 4),
        f"{K_CONV}.lokr_w2_b": drawn(R, 4, seed=1), f"{K_CONV}.alpha": N(F),
    },
    "full": {f"{K_CONV}.diff": drawn(16, 8, 3, 3), f"{K_CONV}.diff_b": drawn(16)},
    "norm": {f"{K_NORM}.w_norm": drawn(8), f"{K_NORM}.b_norm": drawn(8, seed=1)},
    "lora and a bias": {**_lora(K_LINEAR, 16, 8), f"{K_LINEAR}.diff_b": drawn(16), f"{K_LINEAR}.alpha": N(F)},
    "dora": {**_lora(K_LINEAR, 16, 8), f"{K_LINEAR}.alpha": N(F), f"{K_LINEAR}.dora_scale": drawn(16, 1).abs()},
    "dora of inputs": {
        **_lora(K_LINEAR, 16, 8), f"{K_LINEAR}.alpha": N(F), f"{K_LINEAR}.dora_scale": drawn(1, 8).abs()
    },
    "dora of a convolution": {
        **_lora(K_CONV, 16, 8, 3, 3), f"{K_CONV}.alpha": N(F), f"{K_CONV}.dora_scale": drawn(16, 1, 1, 1).abs()
    },
    "oft": {f"{K_LINEAR}.oft_blocks": drawn(4, 4, 4), f"{K_LINEAR}.alpha": N(0.0)},
    "oft, bound": {
        f"{K_CONV}.oft_blocks": drawn(4, 4, 4), f"{K_CONV}.alpha": N(0.01), f"{K_CONV}.rescale": drawn(16, 1, 1, 1)
    },
    "boft": {f"{K_LINEAR}.oft_blocks": drawn(3, 4, 4, 4), f"{K_LINEAR}.alpha": N(0.0)},
    "ia3 of outputs": {f"{K_LINEAR}.weight": drawn(16), f"{K_LINEAR}.on_input": N(0)},
    "ia3 of inputs": {f"{K_CONV}.weight": drawn(1, 8, 1, 1), f"{K_CONV}.on_input": N(1)},
    "glora": {
        f"{K_LINEAR}.a1.weight": drawn(8, R), f"{K_LINEAR}.a2.weight": drawn(R, 8, seed=1),
        f"{K_LINEAR}.b1.weight": drawn(16, R), f"{K_LINEAR}.b2.weight": drawn(R, 8, seed=2), f"{K_LINEAR}.alpha": N(F),
    },
    "glora of a convolution": {
        f"{K_CONV}.a1.weight": drawn(8, R, 1, 1), f"{K_CONV}.a2.weight": drawn(R, 8, 1, 1, seed=1),
        f"{K_CONV}.b1.weight": drawn(16, R, 1, 1), f"{K_CONV}.b2.weight": drawn(R, 8, 3, 3, seed=2),
        f"{K_CONV}.alpha": N(F),
    },
    "glora of another age": {
        f"{K_LINEAR}.a1.weight": drawn(R, 8), f"{K_LINEAR}.a2.weight": drawn(8, R, seed=1),
        f"{K_LINEAR}.b1.weight": drawn(R, 8, seed=2), f"{K_LINEAR}.b2.weight": drawn(16, R), f"{K_LINEAR}.alpha": N(F),
    },
    "set": {f"{K_CONV}.set_weight": drawn(16, 8, 3, 3, seed=9)},
}  # fmt: skip
"""A file of every kind in kohya's names, for modules of `network`."""
ADDED = [kind for kind in FILES if not kind.startswith(("dora", "oft", "boft", "ia3", "glora", "set"))]
"""Those that add something whatever the weights are."""
