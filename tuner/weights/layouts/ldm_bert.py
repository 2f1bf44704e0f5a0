"""Modules of latent diffusion's text encoder: what they are called in single files, and in diffusers' folder `bert`.

A single file has a list of sublayers in which attention and feed-forward take turns, each with its norm.
"""

import re
from collections.abc import Iterable

LAYER = re.compile(r"(?:attn_layers|model)\.layers\.(\d+)\.")
ATTENTION = {
    "0": "self_attn_layer_norm",
    "1.to_q": "self_attn.q_proj",
    "1.to_k": "self_attn.k_proj",
    "1.to_v": "self_attn.v_proj",
    "1.to_out": "self_attn.out_proj",
}
FEED_FORWARD = {"0": "final_layer_norm", "1.net.0.0": "fc1", "1.net.2": "fc2"}
OUTSIDE = {
    "token_emb": "model.embed_tokens",
    "pos_emb.emb": "model.embed_positions",
    "norm": "model.layer_norm",
    "to_logits": "to_logits",
}


def sublayers(names: Iterable[str]) -> int:
    """How many numbers there are in the list of layers that tensors of these names, of either layout, are in."""
    return max((int(found[1]) + 1 for name in names if (found := LAYER.match(name))), default=0)


def modules(layers: int) -> dict[str, str]:
    """diffusers' modules by those of a single file, of an encoder with so many layers: each is two sublayers there."""
    made = dict(OUTSIDE)
    for layer in range(layers):
        for number, parts in ((2 * layer, ATTENTION), (2 * layer + 1, FEED_FORWARD)):
            made |= {f"attn_layers.layers.{number}.{own}": f"model.layers.{layer}.{its}" for own, its in parts.items()}
    return made
