"""Pipelines small enough for tests, made in code: 64 px, random, a tokenizer of letters."""

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    LDMTextToImagePipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import (
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(pad: str = END) -> CLIPTokenizer:
    """Byte pairs over lower-case letters, with a handful of merges; other characters are unknown.

    `pad` fills texts up: `!` for text encoders that OpenCLIP trained.
    """
    letters = string.ascii_lowercase + string.digits + ",."
    merges = [("t", "h"), ("th", "e</w>"), ("a", "t</w>"), ("o", "t"), ("r", "e"), ("re", "d</w>"), ("c", "at</w>")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    if pad != END:
        words.append(pad)
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=merges, pad_token=pad, model_max_length=77
    )


def text_config(words: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    settings = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 32,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    return CLIPTextConfig(**{**settings, **changes})


def unet(**changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**settings, **changes})


def autoencoder(**changes: Any) -> AutoencoderKL:
    settings: dict[str, Any] = {
        "latent_channels": 4,
        "block_out_channels": (16,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 64,
    }
    return AutoencoderKL(**{**settings, **changes})


def scheduler(**changes: Any) -> DDIMScheduler:
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**settings, **changes})


LINEAR: dict[str, Any] = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
"""What the U-Nets of Stable Diffusion 2 and XL have otherwise than 1."""
OPEN_CLIP: dict[str, Any] = {"hidden_act": "gelu", "num_hidden_layers": 3}


def sd1(seed: int = 0, **unets: Any) -> StableDiffusionPipeline:
    """Every component in evaluation mode, as `from_pretrained` gives them."""
    return _sd(seed, tokenizer(), {}, unets, {})


def sd2(seed: int = 0, prediction: str = "v_prediction", **unets: Any) -> StableDiffusionPipeline:
    """The 768 model, or with `epsilon` the 512 one: OpenCLIP's encoder without its last layer."""
    settings = {**LINEAR, **unets}
    return _sd(seed, tokenizer("!"), OPEN_CLIP, settings, {"prediction_type": prediction})


def _sd(seed: int, words: CLIPTokenizer, text: Any, unets: Any, schedule: Any) -> StableDiffusionPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=autoencoder().eval(),
            text_encoder=CLIPTextModel(text_config(words, **text)).eval(),
            tokenizer=words,
            unet=unet(**unets).eval(),
            scheduler=scheduler(**schedule),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sdxl(seed: int = 0, **unets: Any) -> StableDiffusionXLPipeline:
    """The base: two text encoders, six numbers of how the picture was cut."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(text_encoder=_first(), tokenizer=tokenizer(), **_xl(96, 6, unets))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def refiner(seed: int = 0) -> StableDiffusionXLImg2ImgPipeline:
    """The second text encoder alone, and a score of beauty."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLImg2ImgPipeline(
            text_encoder=None,
            tokenizer=None,
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            **_xl(64, 5, {}),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _first() -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer())).eval()


def _xl(tokens: int, numbers: int, unets: Any) -> dict[str, Any]:
    words = tokenizer("!")
    settings = {
        **LINEAR,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": tokens,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 8 * numbers,
    }
    second = text_config(words, **OPEN_CLIP, hidden_size=64, projection_dim=64)
    return {
        "vae": autoencoder(scaling_factor=0.13025, force_upcast=True).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(second).eval(),
        "tokenizer_2": words,
        "unet": unet(**{**settings, **unets}).eval(),
        "scheduler": scheduler(),
        "add_watermarker": False,
    }


def sd3(seed: int = 0, half: bool = True, t5: bool = True, **transformers: Any) -> StableDiffusion3Pipeline:
    """3.5 Medium, or, without `half`, 3: neither normed queries nor second attention; without `t5`, zeros for it."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 96,
        "pooled_projection_dim": 96,
        "pos_embed_max_size": 16,
        **({"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"} if half else {}),
        **transformers,
    }
    words = [tokenizer(), tokenizer("!")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**settings).eval(),
            vae=_flow_autoencoder(scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=CLIPTextModelWithProjection(text_config(words[0])).eval(),
            tokenizer=words[0],
            text_encoder_2=CLIPTextModelWithProjection(
                text_config(words[1], hidden_act="gelu", hidden_size=64, projection_dim=64)
            ).eval(),
            tokenizer_2=words[1],
            text_encoder_3=t5_encoder() if t5 else None,
            tokenizer_3=t5_tokenizer() if t5 else None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux(seed: int = 0, dev: bool = True, **transformers: Any) -> FluxPipeline:
    """Flux.1 dev, or schnell: told no guidance, and its noise levels are not moved."""
    settings: dict[str, Any] = {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 96,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": dev,
        **transformers,
    }
    words = tokenizer()
    moved = {"use_dynamic_shifting": True, "shift": 3.0} if dev else {"shift": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            transformer=FluxTransformer2DModel(**settings).eval(),
            vae=_flow_autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=CLIPTextModel(text_config(words)).eval(),
            tokenizer=words,
            text_encoder_2=t5_encoder(),
            tokenizer_2=t5_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(**moved),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def t5_tokenizer() -> T5TokenizerFast:
    """Letters and a few words of SentencePiece, with scores as its unigrams have them."""
    ends = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"\u2581{word}", -2.0) for word in ("the", "red", "cat", "robot")]
    letters = [("\u2581", -4.0), *((letter, -6.0) for letter in string.ascii_lowercase + string.digits + ",.")]
    return T5TokenizerFast(vocab=[*ends, *words, *letters], extra_ids=4)


def t5_encoder() -> T5EncoderModel:
    sizes = {"d_model": 96, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    words = len(t5_tokenizer())
    return T5EncoderModel(T5Config(vocab_size=words, feed_forward_proj="gated-gelu", **sizes)).eval()


def _flow_autoencoder(**scale: float) -> AutoencoderKL:
    return autoencoder(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **scale).eval()


def _pixels(**changes: Any) -> UNet2DModel:
    settings: dict[str, Any] = {
        "sample_size": 64,
        "layers_per_block": 1,
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DModel(**{**settings, **changes})


def _quantized(**changes: Any) -> VQModel:
    settings: dict[str, Any] = {
        "block_out_channels": (16,) * 3,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 3,
        "num_vq_embeddings": 64,
        "norm_num_groups": 8,
        "scaling_factor": 1.0,
    }
    return VQModel(**{**settings, **changes})


def ddpm(seed: int = 0, ddim: bool = False, **unets: Any) -> Any:
    """Of pixels, told nothing; with `num_class_embeds` told a class. Its schedule is DDPM's."""
    kinds = (DDIMPipeline, DDIMScheduler) if ddim else (DDPMPipeline, DDPMScheduler)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline: Any = kinds[0](unet=_pixels(**unets).eval(), scheduler=kinds[1]())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ldm_uncond(seed: int = 0, **autoencoders: Any) -> LDMPipeline:
    """Of a VQ autoencoder's latents, told nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = LDMPipeline(
            vqvae=_quantized(**autoencoders).eval(),
            unet=_pixels(sample_size=16).eval(),
            scheduler=scheduler(beta_start=0.0015, beta_end=0.0195),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def bert_tokenizer() -> BertTokenizer:
    """Words, letters and their continuations."""
    letters = string.ascii_lowercase + string.digits + ",."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "cat", "robot", "blue", *letters]
    words += [f"##{letter}" for letter in letters]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=77)


def ldm(seed: int = 0, vq: bool = False) -> LDMTextToImagePipeline:
    """Latent diffusion told by a BERT-like encoder."""
    words = bert_tokenizer()
    sizes = {"encoder_layers": 2, "encoder_ffn_dim": 64, "encoder_attention_heads": 4, "head_dim": 8, "d_model": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = LDMTextToImagePipeline(
            vqvae=_quantized(latent_channels=4, block_out_channels=(16,) * 4,
                             down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                             scaling_factor=0.5).eval() if vq else autoencoder().eval(),
            bert=LDMBertModel(LDMBertConfig(vocab_size=len(words), **sizes)).eval(),
            tokenizer=words,
            unet=unet().eval(),
            scheduler=scheduler(),
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
