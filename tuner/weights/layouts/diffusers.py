"""diffusers' own names, which are the canonical ones: `unet.…`, `vae.…`, `text_encoder.text_model.…`.

Two of them have changed over the years, and files of either age are in use. transformers from 5.6 on leaves
`text_model.` out of a CLIP text encoder's names; the canonical ones have it. diffusers up to 0.12 called the four
layers of an autoencoder's attention otherwise, and those of a U-Net without text.
"""

import re

VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What they were called up to diffusers 0.12, and are called now."""

_FLAT_CLIP = re.compile(r"(embeddings|encoder\.layers|final_layer_norm)\.")
_OLD_ATTENTION = re.compile(rf"(.*\.attentions\.\d+\.)({'|'.join(VAE_ATTENTION)})(\.\w+)")


def canonical(component: str, name: str) -> str:
    """The canonical name, component in front, of the tensor `name` in the folder `component` of a pipeline."""
    if component.startswith("text_encoder") and _FLAT_CLIP.match(name):
        name = f"text_model.{name}"
    elif component in ("vae", "vqvae", "unet") and (old := _OLD_ATTENTION.fullmatch(name)):
        name = old[1] + VAE_ATTENTION[old[2]] + old[3]
    return f"{component}.{name}"
