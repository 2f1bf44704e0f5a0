"""Names and shapes of every tensor of the original single files, built from the sizes in their published configs.

Built here as CompVis' and Stability's code lays the networks out (v1-inference.yaml, sd_xl_base.yaml), not by the
translation under test. `DIGESTS` are of lists that were made from the released files themselves.
"""

import hashlib
from collections.abc import Mapping

import torch

from tuner.weights.store import TensorMeta

Shapes = dict[str, tuple[int, ...]]

DIGESTS = {
    "sd1": "bcf4603c65ebe128ddff3a53973ab8eac10a5560f7a17846af3c3026837b5295",
    "sdxl": "84f438ed3e7c5a4ac531a367ebdcaf7d11c4cdba51a81616235aa133cf71b198",
}
"""Of sd-mecha's key lists (github.com/ljleb/sd-mecha, model_configs: sd1-ldm, sdxl-sgm), without what files may lack:
averages, schedules, marks, `position_ids` and `logit_scale`."""


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
