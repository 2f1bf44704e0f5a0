"""What a Flux transformer's modules are called in original single files, those of Black Forest Labs.

Where diffusers has three or four layers on one input, the original has one: its rows are theirs, one after another. The
last modulation's halves are the other way round: shift and scale there, scale and shift in diffusers.
"""

import re
from collections.abc import Collection

ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
SCALE = re.compile(r".*_norm")
"""Original modules whose one tensor is called `scale`, not `weight`."""


def modules(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """diffusers' modules whose rows make up each original one, in their order, by its name.

    Args:
        names: of the transformer's tensors or modules, in either layout; they say how many blocks there are.
    """
    found: dict[str, tuple[str, ...]] = {original: (name,) for original, name in ENDS.items()}
    for ours, theirs, table in (
        ("transformer_blocks", "double_blocks", DOUBLE),
        ("single_transformer_blocks", "single_blocks", SINGLE),
    ):
        places = [re.match(rf"(?:{ours}|{theirs})\.(\d+)\.", name) for name in names]
        for block in range(max((int(place[1]) + 1 for place in places if place), default=0)):
            for original, parts in table.items():
                found[f"{theirs}.{block}.{original}"] = tuple(f"{ours}.{block}.{part}" for part in parts)
    return found


def swapped(names: Collection[str]) -> set[str]:
    """diffusers' modules whose halves are the other way round in the original."""
    return {"norm_out.linear"}
