"""What a Stable Diffusion 3 transformer's modules are called in original single files, those of Stability.

Where diffusers has three layers on one input, the original has one: its rows are theirs, one after another. The last
modulations' halves are the other way round, shift and scale there, scale and shift in diffusers: the one of the last
layer, and that of the text in the last block.
"""

import re
from collections.abc import Collection

ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
BLOCK = {
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
"""Not every block has a second attention or norms of queries and keys, and the last has less for the text."""
TABLE = {"pos_embed": "pos_embed.pos_embed"}
"""A tensor that is no module's."""

_BLOCK = re.compile(r"(?:transformer_blocks|joint_blocks)\.(\d+)\.")


def modules(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """diffusers' modules whose rows make up each original one, in their order, by its name.

    Args:
        names: of the transformer's tensors or modules, in either layout; they say how many blocks there are.
    """
    found: dict[str, tuple[str, ...]] = {original: (name,) for original, name in ENDS.items()}
    for block in range(blocks(names)):
        for original, parts in BLOCK.items():
            found[f"joint_blocks.{block}.{original}"] = tuple(f"transformer_blocks.{block}.{part}" for part in parts)
    return found


def blocks(names: Collection[str]) -> int:
    """How many there are."""
    return max((int(place[1]) + 1 for name in names if (place := _BLOCK.match(name))), default=0)


def swapped(names: Collection[str]) -> set[str]:
    """diffusers' modules whose halves are the other way round in the original."""
    return {"norm_out.linear", f"transformer_blocks.{blocks(names) - 1}.norm1_context.linear"}
