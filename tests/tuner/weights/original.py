"""Names and shapes of every tensor of the original single files, built from the sizes in their published configs.

Built here as CompVis', Stability's and Black Forest Labs' code lays the networks out (v1-inference.yaml,
sd_xl_base.yaml, mmditx.py of sd3.5, model.py of flux), not by the translation under test. `DIGESTS` are of lists that
were made from the released files themselves.
"""

import hashlib
from collections.abc import Mapping

import torch

from tuner.weights.store import TensorMeta

Shapes = dict[str, tuple[int, ...]]

DIGESTS = {
    "sd1": "bcf4603c65ebe128ddff3a53973ab8eac10a5560f7a17846af3c3026837b5295",
    "sdxl": "84f438ed3e7c5a4ac531a367ebdcaf7d11c4cdba51a81616235aa133cf71b198",
    "sd3-medium": "37926b679142fcfc3e278d86066266adf56b1f27a38f07e9847cc2b1f71fa037",
    "flux-dev": "37a3e06f15a6e43751eeb7368540c2ec73b8b8ae23ccb58cb1e7d805100319ae",
}
"""Of sd-mecha's key lists (github.com/ljleb/sd-mecha, model_configs: sd1-ldm, sdxl-sgm, sd3-comfyui, flux-flux),
without what files may lack: averages, schedules, marks, `position_ids` and `logit_scale`."""


def digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    lines = sorted(f"{name} {list(shape)}\n" for name, shape in shapes.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def metas(shapes: Shapes, dtype: torch.dtype = torch.float16) -> dict[str, TensorMeta]:
    return {name: TensorMeta(shape, dtype) for name, shape in shapes.items()}


def layer(*shape: int, bias: bool = True) -> Shapes:
    return {"weight": shape, "bias": shape[:1]} if bias else {"weight": shape}


def put(prefix: str, **parts: Shapes) -> Shapes:
    """The parts' names, `__` for `.`, with `prefix` in front."""
    return {
        f"{prefix}{part.lstrip('_').replace('__', '.')}.{name}": shape
        for part, shapes in parts.items()
        for name, shape in shapes.items()
    }


def attention(prefix: str, width: int, depth: int, context: int, conv: bool) -> Shapes:
    ones = (1, 1) if conv else ()
    found = put(prefix, norm=layer(width), proj_in=layer(width, width, *ones), proj_out=layer(width, width, *ones))
    for index in range(depth):
        block = f"{prefix}transformer_blocks.{index}."
        for name, source in (("attn1", width), ("attn2", context)):
            found |= put(
                f"{block}{name}.",
                to_q=layer(width, width, bias=False),
                to_k=layer(width, source, bias=False),
                to_v=layer(width, source, bias=False),
                to_out__0=layer(width, width),
            )
        found |= put(block, norm1=layer(width), norm2=layer(width), norm3=layer(width))
        found |= put(block, ff__net__0__proj=layer(8 * width, width), ff__net__2=layer(width, 4 * width))
    return found


def unet(
    prefix: str = "model.diffusion_model.",
    width: int = 320,
    multiples: tuple[int, ...] = (1, 2, 4, 4),
    depths: tuple[int, ...] = (1, 1, 1, 0),
    middle: int = 1,
    context: int = 768,
    conv: bool = True,
    channels: int = 4,
    sizes: int = 0,
) -> Shapes:
    """`depths`: transformer blocks on each level; `sizes`: width of what it is told beside the text, 0 for nothing."""

    def residual(place: str, source: int, target: int) -> Shapes:
        skip = {"skip_connection": layer(target, source, 1, 1)} if source != target else {}
        return put(
            place,
            in_layers__0=layer(source),
            in_layers__2=layer(target, source, 3, 3),
            emb_layers__1=layer(target, 4 * width),
            out_layers__0=layer(target),
            out_layers__3=layer(target, target, 3, 3),
            **skip,
        )

    found = put(prefix, time_embed__0=layer(4 * width, width), time_embed__2=layer(4 * width, 4 * width))
    if sizes:
        found |= put(prefix, label_emb__0__0=layer(4 * width, sizes), label_emb__0__2=layer(4 * width, 4 * width))
    found |= put(f"{prefix}input_blocks.0.", _0=layer(width, channels, 3, 3))
    number, now, skips = 1, width, [width]
    for level, (multiple, depth) in enumerate(zip(multiples, depths, strict=True)):
        for _ in range(2):
            place = f"{prefix}input_blocks.{number}."
            found |= residual(f"{place}0.", now, multiple * width)
            now = multiple * width
            found |= attention(f"{place}1.", now, depth, context, conv) if depth else {}
            skips.append(now)
            number += 1
        if level < len(multiples) - 1:
            found |= put(f"{prefix}input_blocks.{number}.", _0__op=layer(now, now, 3, 3))
            skips.append(now)
            number += 1
    found |= residual(f"{prefix}middle_block.0.", now, now)
    found |= attention(f"{prefix}middle_block.1.", now, middle, context, conv)
    found |= residual(f"{prefix}middle_block.2.", now, now)
    number = 0
    for level, (multiple, depth) in reversed(list(enumerate(zip(multiples, depths, strict=True)))):
        for index in range(3):
            place = f"{prefix}output_blocks.{number}."
            found |= residual(f"{place}0.", now + skips.pop(), multiple * width)
            now = multiple * width
            found |= attention(f"{place}1.", now, depth, context, conv) if depth else {}
            if level and index == 2:
                found |= put(f"{place}{2 if depth else 1}.", conv=layer(now, now, 3, 3))
            number += 1
    return found | put(prefix, out__0=layer(width), out__2=layer(4, width, 3, 3))


def vae(prefix: str = "first_stage_model.", width: int = 128, latent: int = 4) -> Shapes:
    def residual(place: str, source: int, target: int) -> Shapes:
        skip = {"nin_shortcut": layer(target, source, 1, 1)} if source != target else {}
        convs = {"conv1": layer(target, source, 3, 3), "conv2": layer(target, target, 3, 3)}
        return put(place, norm1=layer(source), norm2=layer(target), **convs, **skip)

    def half(place: str, coder: str) -> Shapes:
        wide = 4 * width
        found = residual(f"{place}mid.block_1.", wide, wide) | residual(f"{place}mid.block_2.", wide, wide)
        found |= put(f"{place}mid.attn_1.", **{name: layer(wide, wide, 1, 1) for name in ("q", "k", "v", "proj_out")})
        found |= put(f"{place}mid.attn_1.", norm=layer(wide))
        levels = [width, 2 * width, wide, wide]
        now = width if coder == "down" else wide
        for level, target in enumerate(levels) if coder == "down" else reversed(list(enumerate(levels))):
            for index in range(2 if coder == "down" else 3):
                found |= residual(f"{place}{coder}.{level}.block.{index}.", now, target)
                now = target
            if coder == "down" and level < 3:
                found |= put(f"{place}down.{level}.", downsample__conv=layer(now, now, 3, 3))
            if coder == "up" and level > 0:
                found |= put(f"{place}up.{level}.", upsample__conv=layer(now, now, 3, 3))
        return found | put(place, norm_out=layer(now))

    found = half(f"{prefix}encoder.", "down") | half(f"{prefix}decoder.", "up")
    found |= put(f"{prefix}encoder.", conv_in=layer(width, 3, 3, 3), conv_out=layer(2 * latent, 4 * width, 3, 3))
    found |= put(f"{prefix}decoder.", conv_in=layer(4 * width, latent, 3, 3), conv_out=layer(3, width, 3, 3))
    found |= put(prefix, quant_conv=layer(2 * latent, 2 * latent, 1, 1))
    return found | put(prefix, post_quant_conv=layer(latent, latent, 1, 1))


def clip(prefix: str, width: int = 768, layers: int = 12) -> Shapes:
    found = put(
        f"{prefix}text_model.",
        embeddings__token_embedding=layer(49408, width, bias=False),
        embeddings__position_embedding=layer(77, width, bias=False),
        final_layer_norm=layer(width),
    )
    for index in range(layers):
        place = f"{prefix}text_model.encoder.layers.{index}."
        found |= put(place, layer_norm1=layer(width), layer_norm2=layer(width))
        found |= put(place, mlp__fc1=layer(4 * width, width), mlp__fc2=layer(width, 4 * width))
        found |= put(f"{place}self_attn.", **{f"{name}_proj": layer(width, width) for name in ("q", "k", "v", "out")})
    return found


def open_clip(prefix: str, width: int = 1280, layers: int = 32) -> Shapes:
    found: Shapes = {
        f"{prefix}token_embedding.weight": (49408, width),
        f"{prefix}positional_embedding": (77, width),
        f"{prefix}text_projection": (width, width),
    }
    for index in range(layers):
        place = f"{prefix}transformer.resblocks.{index}."
        found |= put(place, ln_1=layer(width), ln_2=layer(width), attn__out_proj=layer(width, width))
        found |= put(place, mlp__c_fc=layer(4 * width, width), mlp__c_proj=layer(width, 4 * width))
        found |= {f"{place}attn.in_proj_weight": (3 * width, width), f"{place}attn.in_proj_bias": (3 * width,)}
    return found | put(prefix, ln_final=layer(width))


def sd1(channels: int = 4) -> Shapes:
    return unet(channels=channels) | vae() | clip("cond_stage_model.transformer.")


def sd2(channels: int = 4) -> Shapes:
    text = open_clip("cond_stage_model.model.", 1024, 24)
    return unet(channels=channels, context=1024, conv=False) | vae() | text


def sdxl(channels: int = 4) -> Shapes:
    network = unet(
        multiples=(1, 2, 4), depths=(0, 2, 10), middle=10, context=2048, conv=False, channels=channels, sizes=2816
    )
    texts = clip("conditioner.embedders.0.transformer.") | open_clip("conditioner.embedders.1.model.")
    return network | vae() | texts


def sdxl_refiner() -> Shapes:
    network = unet(width=384, depths=(0, 4, 4, 0), middle=4, context=1280, conv=False, sizes=2560)
    return network | vae() | open_clip("conditioner.embedders.0.model.")


def t5(prefix: str, width: int = 4096, layers: int = 24, heads: int = 64, inner: int = 10240) -> Shapes:
    found: Shapes = {
        f"{prefix}shared.weight": (32128, width),
        f"{prefix}encoder.final_layer_norm.weight": (width,),
        f"{prefix}encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, heads),
    }
    for index in range(layers):
        place = f"{prefix}encoder.block.{index}.layer."
        found |= {f"{place}0.SelfAttention.{name}.weight": (64 * heads, width) for name in "qkv"}
        found |= {
            f"{place}0.SelfAttention.o.weight": (width, 64 * heads),
            f"{place}0.layer_norm.weight": (width,),
            f"{place}1.layer_norm.weight": (width,),
            f"{place}1.DenseReluDense.wi_0.weight": (inner, width),
            f"{place}1.DenseReluDense.wi_1.weight": (inner, width),
            f"{place}1.DenseReluDense.wo.weight": (width, inner),
        }
    return found


def mmdit(
    prefix: str = "model.diffusion_model.",
    width: int = 1536,
    depth: int = 24,
    head: int = 64,
    normed: bool = False,
    dual: int = 0,
    positions: int = 192,
    channels: int = 16,
    context: int = 4096,
    pooled: int = 2048,
) -> Shapes:
    """`normed`: whether queries and keys have norms; `dual`: how many blocks have a second attention."""
    found: Shapes = {f"{prefix}pos_embed": (1, positions**2, width)}
    found |= put(
        prefix,
        x_embedder__proj=layer(width, channels, 2, 2),
        context_embedder=layer(width, context),
        t_embedder__mlp__0=layer(width, 256),
        t_embedder__mlp__2=layer(width, width),
        y_embedder__mlp__0=layer(width, pooled),
        y_embedder__mlp__2=layer(width, width),
        final_layer__linear=layer(4 * channels, width),
        final_layer__adaLN_modulation__1=layer(2 * width, width),
    )
    norms = {"ln_q": layer(head, bias=False), "ln_k": layer(head, bias=False)} if normed else {}
    for index in range(depth):
        last = index == depth - 1
        for stream, sizes in (("x_block", 9 if index < dual else 6), ("context_block", 2 if last else 6)):
            place = f"{prefix}joint_blocks.{index}.{stream}."
            found |= put(place, adaLN_modulation__1=layer(sizes * width, width))
            found |= put(f"{place}attn.", qkv=layer(3 * width, width), **norms)
            if sizes > 2:
                found |= put(f"{place}attn.", proj=layer(width, width))
                found |= put(place, mlp__fc1=layer(4 * width, width), mlp__fc2=layer(width, 4 * width))
            if sizes == 9:
                found |= put(f"{place}attn2.", qkv=layer(3 * width, width), proj=layer(width, width), **norms)
    return found


def flux(
    prefix: str = "model.diffusion_model.",
    width: int = 3072,
    double: int = 19,
    single: int = 38,
    head: int = 128,
    channels: int = 64,
    guided: bool = True,
    context: int = 4096,
    pooled: int = 768,
    out: int = 64,
) -> Shapes:
    found = put(prefix, img_in=layer(width, channels), txt_in=layer(width, context))
    embedders = {"time_in": 256, "vector_in": pooled} | ({"guidance_in": 256} if guided else {})
    for name, size in embedders.items():
        found |= put(f"{prefix}{name}.", in_layer=layer(width, size), out_layer=layer(width, width))
    found |= put(f"{prefix}final_layer.", linear=layer(out, width), adaLN_modulation__1=layer(2 * width, width))
    for index in range(double):
        for stream in ("img", "txt"):
            place = f"{prefix}double_blocks.{index}.{stream}_"
            found |= put(place, mod__lin=layer(6 * width, width), attn__qkv=layer(3 * width, width))
            found |= put(place, attn__proj=layer(width, width))
            found |= put(place, mlp__0=layer(4 * width, width), mlp__2=layer(width, 4 * width))
            found |= {f"{place}attn.norm.{name}_norm.scale": (head,) for name in ("query", "key")}
    for index in range(single):
        place = f"{prefix}single_blocks.{index}."
        found |= put(place, modulation__lin=layer(3 * width, width), linear1=layer(7 * width, width))
        found |= put(place, linear2=layer(width, 5 * width))
        found |= {f"{place}norm.{name}_norm.scale": (head,) for name in ("query", "key")}
    return found


TEXT = "text_encoders."


def vae16(prefix: str = "first_stage_model.", width: int = 128) -> Shapes:
    """The autoencoder of 16 channels, which has no convolutions around its latents."""
    return {name: shape for name, shape in vae(prefix, width, 16).items() if "quant_conv" not in name}


def sd3(variant: str = "sd3-medium") -> Shapes:
    """All in one, with T5."""
    network = {
        "sd3-medium": mmdit(),
        "sd35-medium": mmdit(normed=True, dual=13, positions=384),
        "sd35-large": mmdit(width=2432, depth=38, normed=True),
    }[variant]
    texts = clip(f"{TEXT}clip_l.transformer.") | clip(f"{TEXT}clip_g.transformer.", 1280, 32)
    texts |= {
        f"{TEXT}{name}.transformer.text_projection.weight": (w, w) for name, w in (("clip_l", 768), ("clip_g", 1280))
    }
    return network | vae16() | texts | t5(f"{TEXT}t5xxl.transformer.")


def flux_dev(guided: bool = True) -> Shapes:
    """All in one, as ComfyUI has it."""
    texts = clip(f"{TEXT}clip_l.transformer.") | t5(f"{TEXT}t5xxl.transformer.")
    return flux(guided=guided) | vae16("vae.") | texts
