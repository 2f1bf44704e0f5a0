"""A tiny pipeline of every family, random and complete: released configs with small sizes, the real tokenizers."""

from pathlib import Path
from typing import Any

import torch

from tuner.weights import published
from tuner.weights.published import Json

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 32,
}
TEXT_2 = {**TEXT, "hidden_size": 48, "intermediate_size": 96, "projection_dim": 48}
T5 = {"d_model": 96, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
VAE = {"block_out_channels": [16] * 4, "layers_per_block": 1, "norm_num_groups": 8}
UNET = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
XL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "addition_time_embed_dim": 8,
}
SD3 = {
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 80,
    "pos_embed_max_size": 32,
    "sample_size": 8,
}
FLUX = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}
SMALL: dict[str, dict[str, Json]] = {
    "sd1": {"unet": UNET},
    "sd2": {"unet": {**UNET, "attention_head_dim": [2, 4]}},
    "sdxl": {"unet": {**UNET, **XL, "cross_attention_dim": 80, "projection_class_embeddings_input_dim": 96}},
    "sdxl-refiner": {
        "unet": {
            "block_out_channels": [16, 32, 32, 32],
            "norm_num_groups": 8,
            "sample_size": 8,
            "transformer_layers_per_block": 2,
            "addition_time_embed_dim": 8,
            "cross_attention_dim": 48,
            "attention_head_dim": 4,
            "projection_class_embeddings_input_dim": 88,
        }
    },
    "sd3-medium": {"transformer": SD3},
    "sd35-medium": {"transformer": {**SD3, "dual_attention_layers": [0, 1]}},
    "sd35-large": {"transformer": SD3},
    "flux-dev": {"transformer": FLUX},
    "flux-schnell": {"transformer": FLUX},
}
"""What is smaller than released, beside text encoders and autoencoders."""


def write_configs(variant: str, folder: Path, tokenizers: bool = True) -> Path:
    """The configs and tokenizers of a small `variant`, without weights."""
    configs = {path: dict(content) for path, content in published.configs(variant).items()}
    for path, content in configs.items():
        component = path.partition("/")[0]
        content |= SMALL[variant.removesuffix("-base")].get(component, {})
        if component == "vae":
            content |= {**VAE, "sample_size": 64}
        elif component.startswith("text_encoder"):
            second = content.get("hidden_size") == 1280
            content |= T5 if content["model_type"] == "t5" else TEXT_2 if second else TEXT
    files = {path: published.to_json(content) for path, content in configs.items()}
    if tokenizers:
        files |= published.tokenizers(published.configs(variant))
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def write(variant: str, folder: Path, seed: int = 0) -> Path:
    """A whole small pipeline's folder."""
    import diffusers
    import transformers

    write_configs(variant, folder)
    configs = published.read(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part, names in configs["model_index.json"].items():
            path = f"{part}/config.json"
            if path not in configs:
                continue
            if names[0] == "diffusers":
                getattr(diffusers, names[1]).from_config(configs[path]).save_pretrained(folder / part)
            else:
                kind = transformers.T5Config if configs[path]["model_type"] == "t5" else transformers.CLIPTextConfig
                getattr(transformers, names[1])(kind(**configs[path])).save_pretrained(folder / part)
    return folder


def opened(folder: Path, **given: object) -> Any:
    """The stock pipeline in `folder`, in evaluation mode."""
    import diffusers

    kind = getattr(diffusers, str(published.read(folder)["model_index.json"]["_class_name"]))
    return ready(kind.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32, **given))


def ready(pipeline: Any) -> Any:
    """In evaluation mode, silent, and with the words of T5 tied, which diffusers' reader of single files forgets."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            if type(part).__name__ == "T5EncoderModel":
                part.tie_weights()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any) -> torch.Tensor:
    """A picture of two steps."""
    flow = type(pipeline).__name__ in ("StableDiffusion3Pipeline", "FluxPipeline")
    more: dict[str, Any] = {"max_sequence_length": 32} if flow else {}
    if type(pipeline).__name__ == "StableDiffusionXLImg2ImgPipeline":
        more |= {"image": torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64), "strength": 1.0}
    else:
        more |= {"height": 64, "width": 64}
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipeline("a red cat", num_inference_steps=2, generator=rng, output_type="pt", **more).images
